"""xcomp: compress a video's tokens inside the language model and pick the frames a question needs.

The public names below are loaded on first use, so that ``import xcomp`` (and ``xcomp --help``) stays quick.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout the component folders (backbones/, compressors/, selectors/, configs/) stand beside this package; in a
# wheel they lie inside it. Either way they import as xcomp.backbones.* and so on.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "backbones").is_dir():
    __path__.append(str(_root))

_PUBLIC = {
    "load_backbone": "xcomp.registry",
    "load_compressor": "xcomp.registry",
    "load_selector": "xcomp.registry",
    "load_benchmark": "xcomp.registry",
    "load_config": "xcomp.config",
    "Backbone": "xcomp.backbone",
    "Benchmark": "xcomp.benchmark",
    "Compressor": "xcomp.compressor",
    "Reduction": "xcomp.compressor",
    "VisualTokens": "xcomp.visual",
    "Decoder": "xcomp.decoder",
    "FrameSelector": "xcomp.selector",
    "VideoQA": "xcomp.model",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(_import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'xcomp' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
