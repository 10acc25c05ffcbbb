"""The frame-selector contract: a score per candidate frame for a question, then the frames to show.

A *scorer* defines ``score`` (or ``score_frames``) and shows the best. A *picker* (:class:`Picker`) chooses otherwise,
from the scores of any scorer: it is one class with an option ``scorer``, whose default is what its authors ran.

Shape letters: T candidate frames · E width of an embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

from xcomp.ledger import Work

if TYPE_CHECKING:
    from xcomp.backbone import Backbone, Prompt, ShownVideo
    from xcomp.compressor import Compressor
    from xcomp.decoding import VideoInfo
    from xcomp.inflight import VideoInFlight
    from xcomp.pixels import PixelFormat


@dataclass
class FrameQuery:
    """A question that frames are chosen for: in words, and as the prompt that all candidate frames would be put to.

    ``work`` is what this question alone takes, beside what all questions of the video share:
    ``with video.ledger.charge(query.work)`` measures it. ``id`` is the benchmark's name of the question, ``events`` the
    (start, end) seconds that hold the evidence where a benchmark knows them, ``seed`` the run's, ``video`` the file and
    ``shown`` what is known of it.
    """

    question: str
    prompt: Prompt
    work: Work = field(default_factory=lambda: Work("select"))
    id: str = ""
    events: tuple[tuple[float, float], ...] = ()
    seed: int = 0
    video: str = ""
    shown: ShownVideo | None = None

    @property
    def name(self) -> str:
        """What tells the question from others: the benchmark's name, else its words."""
        return self.id or self.question

    def rng(self) -> np.random.Generator:
        """Random numbers that follow from the run's seed and the question: from the start at each call."""
        return np.random.default_rng(
            [self.seed, int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")]
        )


@dataclass(frozen=True)
class SelectionCost:
    """What choosing takes, from shapes alone: frames whose visual tokens are needed, MACs once a video and a question.

    Frames that are encoded in two ways, as clips of another cut, count twice.
    """

    frames_encoded: int = 0
    video_macs: int = 0
    question_macs: int = 0


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors in one space: ``frames`` (T, E), ``text`` (1, E). ``text`` is None where only frames have any."""

    frames: Tensor
    text: Tensor | None = None


@dataclass
class Candidates:
    """What a picker may look at beside the scores, for one question; what takes work is computed when it is asked for.

    ``times`` are the candidates' seconds, ascending, in a video of ``duration``. ``score`` gives the scores of some
    candidates, ``embed`` vectors of all.
    """

    times: Sequence[float]
    duration: float
    query: FrameQuery | None = None
    score: Callable[[Sequence[int]], Tensor] | None = None
    embed: Callable[[], Embeddings] | None = None
    asked: dict[int, float] = field(default_factory=dict)  # scores that were asked for one by one, by candidate

    @classmethod
    def evenly(cls, count: int, seconds: float = 1.0) -> Candidates:
        """Candidates so many seconds apart, of a video of which nothing else is known."""
        return cls([i * seconds for i in range(count)], count * seconds)

    def __len__(self) -> int:
        return len(self.times)

    @property
    def rate(self) -> float:
        """Candidates a second."""
        return len(self) / self.duration if self.duration > 0 else 1.0

    def rng(self) -> np.random.Generator:
        """Random numbers that follow from the run's seed and the question."""
        return np.random.default_rng(0) if self.query is None else self.query.rng()

    def scores(self, places: Sequence[int]) -> np.ndarray:
        """(len(places),) float64: scores of these candidates, each computed once."""
        missing = [i for i in dict.fromkeys(places) if i not in self.asked]
        if missing:
            self.asked |= dict(zip(missing, self.score(missing).tolist()))
        return np.array([self.asked[i] for i in places])

    def embeddings(self) -> Embeddings:
        if self.embed is None:
            raise ValueError("this picker compares frames by what they show, which needs a video and not scores alone")
        return self.embed()


class FrameSelector(nn.Module):
    """Base class of all selectors. A subclass defines ``score_frames``, or ``score`` for many questions at once."""

    Config: type
    uses_video = True  # False: nothing is looked at before frames are chosen, and only the chosen ones are decoded
    downsamples = False  # True: frames evenly spread, whatever they show
    repeats = False  # True: the method's own definition may show a frame several times

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    # --- what a run asks before it begins ---------------------------------------------------------------------------

    def set_up(self, plugins: Sequence[Any] = ()) -> None:
        """Called once when a run's part is built; ``plugins`` are the folders of the user's own."""

    def check_backbone(self, backbone: Backbone) -> None:
        """ValueError where the backbone cannot show what would be chosen."""

    @property
    def scores_frames(self) -> bool:
        """Whether it gives scores at all; one that does not chooses by number alone, once for all questions."""
        own, base = type(self), FrameSelector
        return own.score is not base.score or own.score_frames is not base.score_frames

    @property
    def key(self) -> Any:
        """Equal for selectors that give equal scores: arms with different pickers share them."""
        config = self.config
        return (type(self).__module__, type(self).__qualname__, repr(config)) if is_dataclass(config) else id(self)

    def pixel_formats(self, backbone: Backbone) -> tuple[PixelFormat, ...]:
        """The formats in which it looks at all candidate frames: they are decoded ahead."""
        return (backbone.pixel_format,) if self.uses_video else ()

    def looks_at(self, info: VideoInfo) -> Sequence[int]:
        """The frames that choosing is sure to look at: they are decoded ahead."""
        return info.candidates if self.uses_video else ()

    def cost(
        self, backbone: Backbone, num_frames: int, query: FrameQuery, compressor: Compressor
    ) -> SelectionCost | None:
        """The cost of choosing among ``num_frames`` candidates; None where a selector does not say."""
        return None if self.uses_video else SelectionCost()

    # --- scores -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self, video: VideoInFlight, queries: Sequence[FrameQuery], compressor: Compressor | None = None
    ) -> list[Tensor]:
        """Scores (T,) of the video's candidate frames for each question, higher is better.

        What a selector takes from ``video`` (``pixels``, ``tokens``, ``features``) is computed once for all questions
        and arms. By default each question is scored by ``score_frames``, with all candidates' pixels at once.
        """
        pixels = video.normalised(video.candidates)
        scores = []
        for query in queries:
            with video.ledger.charge(query.work):
                ids = query.prompt.prefix_ids, query.prompt.question_ids, query.prompt.header_ids
                options = {"compressor": compressor, "question": query.question}
                scores.append(self.score_frames(video.backbone, pixels, *ids, **options))
        return scores

    def score_frames(
        self,
        backbone: Backbone,
        pixels: Tensor,
        prefix_ids: Tensor,
        question_ids: Tensor,
        header_ids: Tensor,
        compressor: Compressor | None = None,
        *,
        question: str | None = None,
    ) -> Tensor:
        """Candidate frames (T, 3, h, w) as the backbone preprocessed them → scores (T,), higher is better.

        ``question`` is the bare question, for selectors with a text tower of their own. Text between the frames is in
        the prompt alone: a selector that runs the language model on it defines ``score``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score_frames(...) or score(...)")

    def score_some(self, video: VideoInFlight, query: FrameQuery, places: Sequence[int]) -> Tensor:
        """(len(places),): scores of some candidates, for pickers that ask for few (``focus``).

        Only where a frame's score does not depend on other frames; a scorer without it is asked for all.
        """
        raise NotImplementedError(f"{type(self).__name__} scores all candidates at once")

    def embed(self, video: VideoInFlight, query: FrameQuery) -> Embeddings:
        """Vectors of all candidates and the question, for pickers that compare frames (``mdp3``).

        By default those of the backbone's vision path, without one for the question: a frame's mean visual token,
        without what all candidates have in common.
        """
        visual = video.visual(video.candidates).frames().float().mean(1)
        visual = torch.nn.functional.normalize(visual - visual.mean(0), dim=-1)
        return Embeddings(visual.repeat_interleave(video.backbone.merged_frames, 0).cpu())

    # --- frames -----------------------------------------------------------------------------------------------------

    def pick(self, scores: Tensor, budget: int, frames: Candidates) -> list[int]:
        """Ascending indices of the frames to show, ``budget`` of them, or all if there are no more."""
        return self.select(scores, budget)

    def select(self, scores: Tensor, budget: int) -> list[int]:
        """Ascending indices of the ``budget`` best frames; ties go to the earlier one. All if there are no more."""
        check_budget(budget)
        return best(scores, budget)


def check_budget(budget: int) -> None:
    if budget < 1:
        raise ValueError(f"a frame budget of {budget} was asked for; it must be at least 1")


def best(scores: Tensor, count: int) -> list[int]:
    """Ascending indices of the highest scores; ties go to the earlier one."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return sorted(torch.sort(scores, descending=True, stable=True).indices[:count].tolist())


def fill_up(chosen: Iterable[int], scores: Tensor, budget: int) -> list[int]:
    """``chosen`` and, while they are fewer than ``budget``, the best of the others; ascending."""
    chosen = set(chosen)
    missing = min(budget, len(scores)) - len(chosen)
    if missing > 0:
        left = torch.tensor([i for i in range(len(scores)) if i not in chosen])
        chosen |= set(left[best(scores[left], missing)].tolist())
    return sorted(chosen)


# --- pickers ----------------------------------------------------------------------------------------------------------


class Picker(FrameSelector):
    """Chooses frames by the scores of another selector, which the option ``scorer`` names. A subclass defines ``pick``.

    ``Config.scorer`` is a name or a mapping with a name and options; its default is what the method's authors ran.
    """

    on_demand = False  # True: asks for scores one by one (``Candidates.scores``); ``pick`` is then given zeros

    def set_up(self, plugins: Sequence[Any] = ()) -> None:
        self._built = build_scorer(self.config.scorer, plugins)

    @property
    def scorer(self) -> FrameSelector:
        if "_built" not in self._modules:
            Picker.set_up(self)
        return self._built

    @property
    def uses_video(self) -> bool:
        return self.scorer.uses_video

    @property
    def key(self) -> Any:
        return self.scorer.key

    def check_backbone(self, backbone: Backbone) -> None:
        self.scorer.check_backbone(backbone)

    def pixel_formats(self, backbone: Backbone) -> tuple[PixelFormat, ...]:
        return self.scorer.pixel_formats(backbone)

    def looks_at(self, info: VideoInfo) -> Sequence[int]:
        return () if self.asks_for_few else self.scorer.looks_at(info)

    @property
    def asks_for_few(self) -> bool:
        """Whether only some candidates are looked at before frames are chosen."""
        return self.on_demand and type(self.scorer).score_some is not FrameSelector.score_some

    def score(
        self, video: VideoInFlight, queries: Sequence[FrameQuery], compressor: Compressor | None = None
    ) -> list[Tensor]:
        return self.scorer.score(video, queries, compressor)

    def score_some(self, video: VideoInFlight, query: FrameQuery, places: Sequence[int]) -> Tensor:
        return self.scorer.score_some(video, query, places)

    def embed(self, video: VideoInFlight, query: FrameQuery) -> Embeddings:
        return self.scorer.embed(video, query)

    def cost(
        self, backbone: Backbone, num_frames: int, query: FrameQuery, compressor: Compressor
    ) -> SelectionCost | None:
        return self.scorer.cost(backbone, num_frames, query, compressor)

    def select(self, scores: Tensor, budget: int) -> list[int]:
        """As ``pick``, for candidates a second apart of which nothing but their scores is known."""
        frames = Candidates.evenly(len(scores))
        frames.score = lambda places: scores[list(places)]
        return self.pick(scores, budget, frames)


# Selectors by node, for as long as somebody uses them: an arm and the pickers of other arms hold one model.
_shared: WeakValueDictionary[str, FrameSelector] = WeakValueDictionary()


def shared_selector(node: Any, plugins: Sequence[Any] = ()) -> FrameSelector:
    """The selector that a node names, one for all that name it alike."""
    from xcomp.config import build_component

    name = repr((_sorted(node), list(map(str, plugins))))
    selector = _shared.get(name)
    if selector is None:
        _shared[name] = selector = build_component("selector", node, plugins)
    return selector


def build_scorer(node: Any, plugins: Sequence[Any] = ()) -> FrameSelector:
    """``shared_selector``; ValueError if it gives no scores."""
    scorer = shared_selector(node, plugins)
    if isinstance(scorer, Picker) or not scorer.scores_frames:
        what = "is a picker itself" if isinstance(scorer, Picker) else "chooses without scores"
        raise ValueError(f"selector '{scorer.plugin_name}' {what}; a scorer is needed, e.g. qc_comp or clip_similarity")
    return scorer


def _sorted(node: Any) -> Any:
    return sorted((str(k), repr(v)) for k, v in node.items()) if isinstance(node, Mapping) else [("name", repr(node))]
