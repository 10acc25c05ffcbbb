"""xcomp as a model of lmms-eval: ``python -m lmms_eval --model xcomp --model_args config=NAME --tasks …``.

lmms-eval (0.7) finds :func:`manifest` by the entry point group ``lmms_eval.models``. Requests are grouped by video, so
that a video is decoded, encoded and run through the language model once for all questions of a task. What xcomp cannot
do for a request (several videos, images, conversations, unknown generation options) ends the run with a line that names
the task and the document. Use, prompts and what was run: docs/lmms_eval.md.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from lmms_eval.api.model import lmms
from tqdm import tqdm

from xcomp.config import ConfigError, Generation, RunConfig, load_config, parse_config
from xcomp.messages import nearest

if TYPE_CHECKING:
    from xcomp.answering import Query
    from xcomp.model import VideoQA

MAX_NEW_TOKENS = 128  # of an answer, where neither task nor configuration say; what lmms-eval's own models take
ERRORS = ("raise", "empty")
MEDIA_KEYS = ("type", "url", "path", "start_time", "end_time", "video_start", "video_end")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")

log = logging.getLogger(__name__)
T = TypeVar("T")


class RequestError(ValueError):
    """A request of lmms-eval that xcomp cannot answer; names task, split and document."""


def manifest() -> Any:
    """What lmms-eval registers: chat messages by default, contexts and visuals with ``--force_simple``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    here = __name__
    return ModelManifest("xcomp", simple_class_path=f"{here}.XCompSimple", chat_class_path=f"{here}.XComp")


@dataclass(frozen=True)
class Asked:
    """One question as a request puts it: about which video, or which seconds of it."""

    video: str
    text: str
    span: tuple[float, float] | None = None

    def query(self) -> Query:
        from xcomp.answering import Query

        return Query(self.video, self.text, self.text, span=self.span)


@dataclass(frozen=True)
class Writing:
    """How the answer to a request is written, and the texts before the first of which it ends."""

    generation: Generation
    until: tuple[str, ...] = ()

    @property
    def key(self) -> Hashable:
        return astuple(self.generation)

    def cut(self, text: str) -> str:
        ends = [place for end in self.until if (place := text.find(end)) >= 0]
        return text[: min(ends, default=len(text))]


class XComp(lmms):
    """A backbone, a compressor and a selector, asked by chat messages.

    ``model_args``: ``config`` is a YAML file or a built-in configuration; every other key is an override of it
    (``frames=64,compressor=lp_comp,backbone.checkpoint=DIR``). Its benchmark is left out. ``errors``: ``raise`` ends
    the run at the first video that cannot be read, ``empty`` answers it with nothing and says so.
    """

    is_simple = False

    def __init__(
        self,
        config: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        errors: str = "raise",
        **overrides: Any,
    ):
        super().__init__()
        if errors not in ERRORS:
            raise ConfigError(f"errors is '{errors}';{nearest(errors, ERRORS)} it must be one of {', '.join(ERRORS)}")
        self.errors = errors
        self._known: dict[str, Writing] = {}  # by the options that a task gives
        self.config = read_config(config, batch_size, max_batch_size, device, overrides)
        from xcomp.model import VideoQA

        self.model: VideoQA = VideoQA.from_config(self.config).eval()

    # --- lmms-eval's interface ----------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request, in their order."""
        read = [self._read(request) for request in requests]
        writing = [self._writing(request) for request in requests]
        return self._written(requests, read, writing)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of each request's rounds. As with lmms-eval's own models a round does not see the ones before it,
        unless the task writes them into its text; one that shows nothing new is about the video before."""
        read: dict[int, Asked] = {number: self._read(request) for number, request in enumerate(requests)}
        writing = [self._writing(request) for request in requests]
        outputs: list[list[str]] = [[] for _ in requests]
        told: list[Any] = [None] * len(requests)
        number_of_round = 0
        while read:
            members = list(read)
            answers = self._written([requests[i] for i in members], read.values(), [writing[i] for i in members])
            number_of_round += 1
            before, read = read, {}
            for i, answer in zip(members, answers):
                outputs[i].append(answer)
                asked, outputs[i], told[i] = self._next_round(
                    requests[i], number_of_round, outputs[i], told[i], before[i]
                )
                if asked is not None:
                    read[i] = asked
        return outputs

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Of each request's continuation: the sum of its tokens' log-probabilities, and if greedy search writes it.

        The choices of a ``multiple_choice`` task get minus that sum: lmms-eval takes the least for its answer, as its
        own models give losses. Their requests hold the continuation; those of ``loglikelihood`` tasks a function.
        """
        continuations: dict[Asked, dict[str, None]] = {}
        first: dict[Asked, Any] = {}
        pairs = []
        for request in requests:
            if len(request.args) != 6:
                raise RequestError(f"{_where(request)}: a continuation without a video; xcomp scores answers to one")
            asked, text = self._read(request, simple=True), self._continuation(request)
            continuations.setdefault(asked, {})[text] = None
            first.setdefault(asked, request)
            pairs.append((asked, text))
        found: dict[tuple[Asked, str], tuple[float, bool]] = {}
        for video, members in self._progress(_grouped(continuations, lambda asked: (asked.video, asked.span))):
            texts = [tuple(continuations[asked]) for asked in members]
            for asked, choices, outcome in zip(members, texts, self._scored(video, members, texts)):
                if isinstance(outcome, Exception):
                    self._refuse(first[asked], outcome)
                    outcome = None
                for place, text in enumerate(choices):
                    scored = outcome[place] if outcome else None
                    found[asked, text] = (scored.logprob, scored.greedy) if scored else (float("-inf"), False)
        losses = [not callable(request.args[1]) for request in requests]
        values = [(-found[pair][0] if loss else found[pair][0], found[pair][1]) for pair, loss in zip(pairs, losses)]
        return [_response(value) for value in values]

    # --- requests -----------------------------------------------------------------------------------------------------

    def _document(self, request: Any) -> Mapping[str, Any]:
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]

    def _read(self, request: Any, *, simple: bool | None = None) -> Asked:
        """What is asked first. Requests for scores are of the simple form whatever the model."""
        if self.is_simple if simple is None else simple:
            context, visuals = request.args[0], request.args[2](self._document(request))
            return asked_simply(context, visuals, _where(request))
        return asked_by_messages(request.args[1](self._document(request)), _where(request))

    def _next_round(
        self, request: Any, number: int, outputs: list[str], told: Any, before: Asked
    ) -> tuple[Asked | None, list[str], Any]:
        """What is asked next, if anything, the answers so far as the task has them, and what it hands on."""
        where = f"{_where(request)}, round {number + 1}"
        given = {"round_idx": number, "previous_output": list(outputs), "previous_round_info": told}
        payload = request.args[3 if self.is_simple else 1](self._document(request), **given)
        if not isinstance(payload, tuple) or len(payload) != (5 if self.is_simple else 4):
            raise RequestError(f"{where}: the task gives {type(payload).__name__} in place of a round")
        *shown, over, outputs_so_far, told = payload
        outputs = list(outputs if outputs_so_far is None else outputs_so_far)
        if over:
            return None, outputs, told
        if self.is_simple:
            visuals, context = shown
            return asked_simply(context, visuals, where, before), outputs, told
        return asked_by_messages(shown[0], where, before), outputs, told

    def _writing(self, request: Any) -> Writing:
        options = request.args[1 if self.is_simple else 2] or {}
        key = json.dumps(options, sort_keys=True, default=repr)
        if key not in self._known:
            self._known[key] = writing_of(options, self.config.generation, f"task {request.task_name}")
        return self._known[key]

    def _continuation(self, request: Any) -> str:
        target = request.args[1]
        text = target(self._document(request)) if callable(target) else target
        if not isinstance(text, str):
            raise RequestError(f"{_where(request)}: the continuation is {text!r}; it must be a text")
        return text

    # --- answers ------------------------------------------------------------------------------------------------------

    def _written(self, requests: Sequence[Any], asked: Iterable[Asked], writing: Sequence[Writing]) -> list[str]:
        """Answers, those about one video and written in one way together."""
        asked, texts = list(asked), [""] * len(requests)
        groups = _grouped(range(len(requests)), lambda i: (asked[i].video, asked[i].span, writing[i].key))
        for _, members in self._progress(groups):
            self.model.answerer.generation = writing[members[0]].generation
            for i, outcome in zip(members, self.model.answer([asked[i].query() for i in members])):
                if isinstance(outcome, Exception):
                    self._refuse(requests[i], outcome)
                else:
                    texts[i] = writing[i].cut(outcome.text)
        return texts

    def _scored(self, video: tuple, asked: Sequence[Asked], texts: Sequence[Sequence[str]]) -> Sequence[Any]:
        from xcomp.video import VideoError

        try:
            with self.model.open(*video) as opened:
                return self.model.answerer.score(opened, [a.query() for a in asked], texts)
        except VideoError as error:
            return [error] * len(asked)

    def _refuse(self, request: Any, error: Exception) -> None:
        """What becomes of a request whose video cannot be read or whose question cannot be put."""
        line = f"{_where(request)}: {error}"
        if self.errors == "raise":
            raise RequestError(f"{line} (model_args errors=empty goes on without it)") from error
        log.error("%s; it counts as no answer", line)

    def _progress(self, groups: Mapping[T, list[Any]]) -> Iterable[tuple[T, list[Any]]]:
        return tqdm(groups.items(), desc="videos", disable=self.rank != 0)


class XCompSimple(XComp):
    """The same, asked by a context and visuals; what tasks that score given answers need (``--force_simple``)."""

    is_simple = True


# --- configuration ----------------------------------------------------------------------------------------------------


def read_config(
    name: str | None,
    batch_size: int | str,
    max_batch_size: int | None,
    device: str | None,
    overrides: Mapping[str, Any],
) -> RunConfig:
    """The configuration that ``--model_args``, ``--batch_size`` and ``--device`` ask for.

    lmms-eval's ``--batch_size`` is 1 unless it is given; then the configuration's own holds.

    Raises:
        ConfigError: for what is missing, unknown or out of range.
    """
    if name is None:
        raise ConfigError("--model_args names no configuration; give config=FILE.yaml, or a built-in one's name")
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ConfigError(f"--batch_size is '{batch_size}'; it must be a number of questions of at least 1")
    if max_batch_size is not None:
        raise ConfigError("--max_batch_size is for --batch_size auto, which xcomp has not; give --batch_size a number")
    given = ["benchmark=null", *(f"{key}={_as_yaml(value)}" for key, value in overrides.items())]
    if int(batch_size) > 1:
        given.append(f"batch_size={batch_size}")
    if device is not None:
        given.append(f"backbone.device={device}")
    config = load_config(name, given)
    if config.arms:
        raise ConfigError(f"config '{name}' has {len(config.arms)} arms; lmms-eval runs one model: give arms=[] too")
    node = config.backbone
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and isinstance(node, Mapping) and node.get("device") == "cuda":
        config.backbone = {**node, "device": f"cuda:{os.environ['LOCAL_RANK']}"}  # each process has a GPU of its own
    return config


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def writing_of(options: Mapping[str, Any], usual: Generation, where: str) -> Writing:
    """``generation_kwargs`` of a task over the configuration's ``generation``. None stands for what is usual.

    Greedy where the temperature is 0; sampled where it is above 0 unless ``do_sample`` is false.

    Raises:
        ConfigError: for an option that is unknown or out of range, naming the nearest.
    """
    given = {key: value for key, value in options.items() if value is not None}
    until = given.pop("until", ())
    until = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(end, str) and end for end in until):
        raise ConfigError(f"{where}: until is {until!r}; it must be texts")
    if "temperature" in given:
        sampled = float(given["temperature"]) > 0
        given["do_sample"] = sampled and bool(given.get("do_sample", True))
        if not sampled:
            del given["temperature"]
    if not given.get("do_sample", usual.do_sample):  # what greedy search does not read; tasks write top_p: 0 beside it
        given = {key: value for key, value in given.items() if key not in ("temperature", "top_p", "top_k")}
    content = {"generation": {**vars(usual), **given}}
    generation = parse_config(content, where).generation.limited(MAX_NEW_TOKENS)
    if generation.mode != "generate":
        raise ConfigError(f"{where}: generation.mode is '{generation.mode}', but the task has its answers written")
    return Writing(generation, until)


# --- requests ---------------------------------------------------------------------------------------------------------


def asked_simply(context: Any, visuals: Any, where: str, before: Asked | None = None) -> Asked:
    """A question of a context and its visuals, of which there must be one video, or none where there is one before."""
    if not isinstance(context, str):
        raise RequestError(f"{where}: the context is {type(context).__name__}; it must be a text")
    visuals = list(visuals) if isinstance(visuals, (list, tuple)) else [] if visuals is None else [visuals]
    return _about([_video(visual, where) for visual in visuals], context, where, before)


def asked_by_messages(messages: Any, where: str, before: Asked | None = None) -> Asked:
    """A question of one user's message of a video and texts behind it."""
    messages = messages if isinstance(messages, (list, tuple)) else [messages]
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if roles != ["user"]:
        raise RequestError(f"{where}: messages of {roles}; xcomp takes one of the user, and writes the system's itself")
    content = messages[0].get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    videos, texts = [], []
    for part in parts:
        if part.get("type") == "text":
            texts.append(str(part.get("text", "")))
        elif any(text.strip() for text in texts):
            raise RequestError(f"{where}: text stands before the {part.get('type')}; xcomp shows the video first")
        else:
            videos.append(_video(part, where))
    return _about(videos, "".join(texts), where, before)


def _about(videos: Sequence[tuple], text: str, where: str, before: Asked | None) -> Asked:
    if len(videos) == 1:
        return Asked(videos[0][0], text, videos[0][1])
    if not videos and before is not None:
        return replace(before, text=text)
    raise RequestError(f"{where}: {len(videos) or 'no'} videos; xcomp answers a question about one")


def _video(visual: Any, where: str) -> tuple[str, tuple[float, float] | None]:
    """(path, seconds of it) of a visual: a path, or a mapping that names one."""
    more: Mapping[str, Any] = {}
    while isinstance(visual, Mapping):
        kind = visual.get("type", "video")
        if kind != "video":
            raise RequestError(f"{where}: a visual of type '{kind}'; xcomp answers questions about a video file")
        for key in visual:
            if key not in MEDIA_KEYS:
                hint = nearest(str(key), MEDIA_KEYS)
                raise RequestError(f"{where}: a video has no key '{key}';{hint} keys: {', '.join(MEDIA_KEYS)}")
        more = {**more, **{k: v for k, v in visual.items() if v is not None}}
        visual = visual.get("url") or visual.get("path")
    if not isinstance(visual, (str, os.PathLike)):
        raise RequestError(f"{where}: a visual is {_kind(visual)}; xcomp answers questions about a video file")
    path = os.fspath(visual).removeprefix("file://")
    if "://" in path:
        raise RequestError(f"{where}: '{path}' is no local file; download it first")
    if path.lower().endswith(IMAGES):
        raise RequestError(f"{where}: '{path}' is an image; xcomp answers questions about a video file")
    start, end = (more.get(a, more.get(b)) for a, b in (("start_time", "video_start"), ("end_time", "video_end")))
    if (start is None) != (end is None):
        raise RequestError(f"{where}: a part of a video needs both its start and its end; it has {start} and {end}")
    return path, None if start is None else (float(start), float(end))


def _response(scored: tuple[float, bool]) -> Any:
    """A score as lmms-eval passes it on unchanged: from 0.7 on it makes text of a tuple that stands for itself."""
    from lmms_eval.api import instance

    unwrap = getattr(instance, "unwrap_generation_output", None)
    return scored if unwrap is None or unwrap(scored)[0] == scored else instance.GenerationResult(scored)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__module__.split('.')[0]} {type(value).__name__}"


def _where(request: Any) -> str:
    return f"task {request.task_name}, document {request.doc_id}"


def _grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Any, list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
