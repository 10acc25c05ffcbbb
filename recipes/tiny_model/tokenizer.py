"""Train the tiny model's tokenizer: a byte-level BPE of Qwen2's form over the needle world's own texts.

    python recipes/tiny_model/tokenizer.py runs/tiny-tokenizer

Every byte is in the vocabulary, so any question can be asked; the world's words are single tokens.
"""

import sys
from pathlib import Path

from transformers import Qwen2Tokenizer

from xcomp.benchmarks.needle import Needle, make_spec, visible_shapes

VOCABULARY = 640
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TIME = "\nThe video lasts for {:.2f} seconds, and {} frames are uniformly sampled from it. "


def texts(num_videos: int = 400) -> list[str]:
    """Prompts, answers, captions and time messages; no video is rendered."""
    needle = Needle(Needle.Config(split="train", num_videos=num_videos, seconds=8.0))
    found = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 50
    for index in range(num_videos):
        spec = make_spec(needle.config, index)
        found.append(TIME.format(index / 3, index % 97))
        found += [event.caption for event in spec.events] + visible_shapes(spec, 0)
        found += ["Describe the video.", "List the shapes."]
        for question in needle.video_questions(spec):
            found += [needle.prompt(question), *question.options]
    return found


def main(folder: Path) -> None:
    blank = Qwen2Tokenizer()
    tokenizer = blank.train_new_from_iterator(texts(), VOCABULARY, new_special_tokens=SPECIAL)
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(folder)
    for text in (" top left", " purple", "(A)", "Which symbol appears first?", "<|im_start|>"):
        print(repr(text), tokenizer(text)["input_ids"])
    print(f"{len(tokenizer)} tokens → {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
