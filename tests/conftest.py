"""What the tests share: small random backbones, and the measure that whole tensors are compared by.

``--device`` and ``--dtype`` are for the tests marked ``device``; ``make test-gpu`` runs these on CUDA. With
``--device pretended`` they run on a device that is not there (:mod:`pretend_cuda`).
"""

from __future__ import annotations

import os

import pytest
import torch
from pretend_cuda import pretend_cuda

from xcomp.tiny import FAMILIES, TinyBackbone, tiny_backbone

__all__ = ["FAMILIES", "relative_error"]


def pytest_addoption(parser):
    group = parser.getgroup("xcomp")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda", "pretended"], help="of tests marked device")
    group.addoption("--dtype", default="float32", choices=["float32", "bfloat16"], help="of tests marked device")


def pytest_configure(config):
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: as many, or sums differ in the last bit
    torch.set_num_threads(1)  # the tests' tensors are small: threads that wait for each other cost more than they bring
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no CUDA device here")


@pytest.fixture(scope="session")
def device(pytestconfig):
    """The name of the device to test on: ``cpu`` or ``cuda``."""
    if pytestconfig.getoption("device") == "pretended":
        with pretend_cuda():
            yield "cuda"
        return
    torch.backends.cudnn.allow_tf32 = False  # or convolutions in float32 have three digits, and tests nothing to hold
    yield pytestconfig.getoption("device")


@pytest.fixture(scope="session")
def dtype(pytestconfig):
    """The name of the type to test in: ``float32`` or ``bfloat16``."""
    return pytestconfig.getoption("dtype")


@pytest.fixture
def make_backbone():
    def make(seed: int = 0, **kwargs) -> TinyBackbone:
        torch.manual_seed(seed)
        return tiny_backbone(seed, **kwargs)

    return make


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over largest value, on whole tensors."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# --- A whole tiny model: VideoChat-Flash's architecture with random weights, and a tokenizer of its own ---------------

ARCHITECTURE = {
    "architectures": ["VideoChatFlashQwenForCausalLM"],
    "model_type": "videochat_flash_qwen",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,  # so that a random model's answers differ from one another
    "tie_word_embeddings": True,
    "mm_vision_tower": "umt-large",
    "mm_vision_select_layer": -2,
    "mm_projector_type": "tome16_mlp_hd64",
    "mm_hidden_size": 32,
    "mm_local_num_frames": 4,
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    },
}


def write_tokenizer(folder):
    """A byte-level tokenizer of Qwen2's form with a few words, trained on the spot."""
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "What colour is the cross? (A) red"] * 4
    trained = Qwen2Tokenizer().train_new_from_iterator(texts, 300, new_special_tokens=special)
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=trained.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)
    return folder


def write_checkpoint(folder, tokenizer):
    """A random VideoChat-Flash of two layers, as ``save_pretrained`` writes it."""
    import xcomp

    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = xcomp.load_backbone(
            "videochat_flash", architecture=ARCHITECTURE, tokenizer=str(tokenizer), attn_implementation="sdpa"
        )
    backbone.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """Folder of a small tokenizer."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_tokenizer):
    """Folder of a random VideoChat-Flash of two layers."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", tiny_tokenizer)


@pytest.fixture(scope="session")
def needle_videos(tmp_path_factory):
    """Options of a needle set of two videos of four seconds; they are written once."""
    import xcomp

    options = {"num_videos": 2, "seconds": 4, "root": str(tmp_path_factory.mktemp("needle"))}
    for split in ("train", "test"):
        xcomp.load_benchmark("needle", split=split, **options).generate()
    return options


@pytest.fixture
def tiny_run(tmp_path, tiny_checkpoint, needle_videos):
    """A run's configuration as a mapping: the tiny model on the needle videos, into ``tmp_path/runs``."""
    return {
        "name": "tiny",
        "output": str(tmp_path / "runs"),
        "backbone": {"name": "videochat_flash", "checkpoint": str(tiny_checkpoint)},
        "compressor": "lp_comp",
        "benchmark": {"name": "needle", **needle_videos},
        "frames": 4,
        "sampling": {"rate": 2, "min_frames": 8, "max_frames": 8},
        "generation": {"max_new_tokens": 3},
        "decoding": {"workers": 0},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }


@pytest.fixture
def stop_before(monkeypatch):
    """Makes training fail before its ``n``-th batch (from 0)."""

    def stop_before(n):
        from xcomp.model import VideoQA

        train, batches = VideoQA.training_step, []

        def training_step(self, batch, batch_idx):
            batches.append(batch_idx)
            if len(batches) > n:
                raise RuntimeError("power cut")
            return train(self, batch, batch_idx)

        monkeypatch.setattr(VideoQA, "training_step", training_step)
        return lambda: monkeypatch.setattr(VideoQA, "training_step", train)

    return stop_before
