"""Let a CPU build what only a GPU can compute."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import inspect
import sys
import unittest.mock
from typing import Any

import torch


def lift_limits_of_this_machine() -> None:
    """Nothing is computed here, so what a CPU cannot compute may be built all the same."""
    pretend_installed("cutlass", "cuda", "quack")
    from vllm.config import ModelConfig
    from vllm.model_executor.layers.attention import mla_attention
    from vllm.model_executor.layers.fused_moe import config as moe
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.platforms import current_platform
    from vllm.platforms.cpu import CpuPlatform
    from vllm.triton_utils import triton

    # would ask processor and tokenizer, which are not there
    ModelConfig._supports_multimodal_inputs = lambda self: self.is_multimodal_model
    triton.set_allocator = lambda allocator: None
    setattr(torch.cuda, "Stream", unittest.mock.MagicMock)  # noqa: B010  mypy: a class
    moe.current_platform = Pretended(current_platform, is_xpu=lambda: True)  # a gate is not needed
    FusedMoEExperts.is_supported_config = staticmethod(lambda *config: (True, None))
    choose = CpuPlatform.get_attn_backend_cls.__func__
    init = mla_attention.MLACommonImpl.__init__

    def get_attn_backend_cls(
        cls: Any, selected: Any, attn_selector_config: Any, **rest: Any
    ) -> str:
        dense = attn_selector_config._replace(use_sparse=False)
        return choose(cls, selected, attn_selector_config=dense, **rest)

    def without_sparse(self: Any, *arguments: Any, **named: Any) -> None:
        known = inspect.signature(init).parameters
        init(self, *arguments, **{k: v for k, v in named.items() if k in known})

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    mla_attention.MLACommonImpl.__init__ = without_sparse


class Pretended:
    """An object with some attributes replaced."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self.original = original
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def pretend_installed(*packages: str) -> None:
    """Kernel packages that files of models import, and that only a GPU's vLLM brings."""

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if name.partition(".")[0] in packages:
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
            return None

        def create_module(self, spec: Any) -> Any:
            return unittest.mock.MagicMock(__path__=[], __spec__=spec, __name__=spec.name)

        def exec_module(self, module: Any) -> None:
            pass

    sys.meta_path.append(Finder())  # last: what is installed is taken
