"""Ask vLLM itself what it makes of a checkpoint: which modules it merges, quantizes, leaves.

    VLLM_PYTHON extract_vllm.py OBSERVATIONS.jsonl CHECKPOINT...

Runs in vLLM's environment, where ckptq is not installed. The checkpoints are tiny, unquantized
ones. Each is observed in a process of its own, and each gives one line of JSON; what fails is
recorded as `error`. `python -m ckptq.engines.tabulate` makes the table of it.

The observation has two halves. The class is built in float32 and loads the checkpoint through its
own `load_weights`, but every tensor holds one number, its own: the numbers found in a parameter
tell which tensors landed in it, and in which order, whatever renaming, stacking or transposing
lies between. Then the class is built under a scheme that takes every Linear, and each module is
asked which method it got and by which name it asked for its scheme.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.abc
import importlib.machinery
import inspect
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# a script's own folder comes first on the path, and a module of ckptq there is named vllm, too
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
os.environ.update(
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_NO_USAGE_STATS="1",
)

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402

FP8_DYNAMIC: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": [],
    "config_groups": {
        "all": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
}
SECONDS = 300
"""For one checkpoint; a tiny one takes three."""


def main() -> None:
    out, *checkpoints = sys.argv[1:]
    import vllm.model_executor.model_loader.utils  # noqa: F401  once, before the forks

    lift_limits_of_this_machine()
    with open(out, "w") as file:
        for checkpoint in checkpoints:
            observed = in_a_process(Path(checkpoint))
            print(json.dumps(observed), file=file, flush=True)
            print(f"{checkpoint}: {observed.get('error') or 'ok'}", file=sys.stderr)


def in_a_process(checkpoint: Path) -> dict[str, Any]:
    """Observe in a fork: vLLM's process groups are made for one model, and some classes crash."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=send_observation, args=(checkpoint, sender)
    )
    process.start()
    sender.close()
    try:
        observed = receiver.recv() if receiver.poll(SECONDS) else {"error": "takes too long"}
    except EOFError:
        process.join()
        observed = {"error": f"crashed with exit code {process.exitcode}"}
    if process.is_alive():
        process.join(5)
        process.kill()
    return {"source": checkpoint.name, **about(checkpoint), **observed}


def send_observation(checkpoint: Path, sender: Any) -> None:
    try:
        observed = observe(checkpoint)
    except Exception as error:  # vLLM raises many kinds
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        observed = {"error": f"{type(error).__name__}: {str(error)[:300]} ({place})"}
    sender.send(observed)


def about(checkpoint: Path) -> dict[str, Any]:
    import vllm

    config = json.loads((checkpoint / "config.json").read_text())
    return {
        "vllm": vllm.__version__.split("+")[0],
        "architecture": config["architectures"][0],
        "model_type": config["model_type"],
        "tied": bool(config.get("tie_word_embeddings", False)),
    }


def observe(checkpoint: Path) -> dict[str, Any]:
    """All that vLLM tells of one checkpoint: the line of the output."""
    start_process_groups()
    disk = list(tensors_of(checkpoint))
    with built(checkpoint, None) as model:
        landed, unfilled = load_numbers(model, disk)
    with recorded_lookups() as lookups, built(checkpoint, FP8_DYNAMIC) as model:
        modules = {name: asked(name, module, lookups) for name, module in model.named_modules()}
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        return {
            "class": type(model).__name__,
            "packed": dict(getattr(model, "packed_modules_mapping", {}) or {}),
            "renames": renames(mapper.get_rename_mapper()) if mapper else {},
            "tensors": {name: list(tensor.shape) for name, tensor in disk},
            "landed": landed,
            "unfilled": unfilled,
            "modules": {name: facts for name, facts in modules.items() if facts},
        }


# --- what lands where -----------------------------------------------------------------------


def tensors_of(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(glob.glob(f"{checkpoint}/*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is no mapping
                yield name, file.get_tensor(name)


def load_numbers(
    model: torch.nn.Module, disk: list[tuple[str, torch.Tensor]]
) -> tuple[dict[str, list[str]], list[str]]:
    """Parameter -> the tensors that it holds, in its own order; parameters that hold none."""
    numbered = [
        (name, torch.full(tensor.shape, number, dtype=torch.float32))
        if tensor.is_floating_point()
        else (name, tensor)
        for number, (name, tensor) in enumerate(disk, start=1)
    ]
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor.fill_(-1.0)  # the number of no tensor
    model.load_weights(iter(numbered))
    names = {float(number): name for number, (name, _) in enumerate(disk, start=1)}
    landed = {
        parameter: [names[value] for value in in_order(tensor) if value in names]
        for parameter, tensor in state.items()
        if tensor.is_floating_point() and tensor.numel()
    }
    unfilled = [name for name, _ in model.named_parameters() if not landed.get(name)]
    return {name: tensors for name, tensors in landed.items() if tensors}, unfilled


def in_order(tensor: torch.Tensor) -> list[float]:
    """The values of a tensor, each once, in the order of their first place."""
    flat = tensor.detach().to(torch.float32).flatten()
    changes = torch.ones_like(flat, dtype=torch.bool)
    changes[1:] = flat[1:] != flat[:-1]
    return list(dict.fromkeys(flat[changes].tolist()))


# --- what becomes quantized -----------------------------------------------------------------


@contextlib.contextmanager
def recorded_lookups() -> Iterator[dict[int, str]]:
    """id of a module -> the name by which it asked for its scheme."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    lookups: dict[int, str] = {}
    original = CompressedTensorsConfig.get_quant_method

    def get_quant_method(self: Any, layer: torch.nn.Module, prefix: str) -> Any:
        lookups[id(layer)] = prefix
        return original(self, layer, prefix)

    CompressedTensorsConfig.get_quant_method = get_quant_method
    try:
        yield lookups
    finally:
        CompressedTensorsConfig.get_quant_method = original


def asked(name: str, module: torch.nn.Module, lookups: dict[int, str]) -> dict[str, Any]:
    """Facts of one module, {} where it is neither a Linear, nor experts, nor attention."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    facts: dict[str, Any] = {}
    kind = type(module).__name__
    method = type(getattr(module, "quant_method", None)).__name__
    if isinstance(module, AttentionLayerBase):
        facts["attention"] = attention_kind(module)
        if getattr(module, "kv_sharing_target_layer_name", None):
            facts["shares_cache_of"] = module.kv_sharing_target_layer_name
    elif any(base.__name__ == "VocabParallelEmbedding" for base in type(module).__mro__):
        facts["fate"] = "quantized" if method.startswith("CompressedTensors") else "plain"
    elif method != "NoneType":
        facts["fate"] = "plain" if "Unquantized" in method else "quantized"
    elif isinstance(module, torch.nn.Linear):
        facts["fate"] = "plain"
    if not facts:
        return {}
    if hasattr(module, "ckpt_gate_proj_name"):
        facts["experts"] = [
            module.ckpt_gate_proj_name,
            module.ckpt_up_proj_name,
            module.ckpt_down_proj_name,
        ]
    if lookups.get(id(module), name) not in ("", name):
        facts["asks_as"] = lookups[id(module)]
    return facts | {"class": kind}


def attention_kind(module: torch.nn.Module) -> str:
    """heads: k and v per head; latent: MLA's one vector; state: no cache of keys and values."""
    classes = {base.__name__ for base in type(module).__mro__}
    if "MambaBase" in classes:
        return "state"
    if "MLAAttention" in classes:
        return "latent"
    return "heads" if "Attention" in classes else "other"


def renames(mapper: Any) -> dict[str, Any]:
    """A class's map of names without its stackings: what vLLM applies to `ignore` and targets."""
    rules = {
        "renaming": [
            [list(r.source_patterns), list(r.target_patterns)] for r in mapper.orig_to_new_renaming
        ],
        "regex": [[p.pattern, new] for p, new in mapper.orig_to_new_regex.items()],
        "substr": [list(pair) for pair in mapper.orig_to_new_substr.items()],
        "prefix": [list(pair) for pair in mapper.orig_to_new_prefix.items()],
        "suffix": [list(pair) for pair in mapper.orig_to_new_suffix.items()],
    }
    return {kind: found for kind, found in rules.items() if found}


# --- building -------------------------------------------------------------------------------


@contextlib.contextmanager
def built(checkpoint: Path, quantization: dict[str, Any] | None) -> Iterator[torch.nn.Module]:
    """vLLM's own class for a checkpoint, its parameters uninitialised, on the CPU."""
    from vllm.config import (
        DeviceConfig,
        LoadConfig,
        ModelConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.model_executor.model_loader.utils import initialize_model

    dtype = "bfloat16" if quantization else "float32"
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((checkpoint / "config.json").read_text())
        if quantization:
            config["quantization_config"] = quantization
        register_if_unknown(config)
        Path(folder, "config.json").write_text(json.dumps(config))
        for other in checkpoint.glob("*.json"):
            if other.name not in ("config.json", "model.safetensors.index.json"):
                Path(folder, other.name).write_bytes(other.read_bytes())
        model = ModelConfig(
            model=folder,
            tokenizer=folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=128,
        )
        vllm = VllmConfig(
            model_config=model,
            device_config=DeviceConfig("cpu"),
            load_config=LoadConfig(device="cpu"),
        )
        with set_current_vllm_config(vllm):
            torch.set_default_dtype(getattr(torch, dtype))
            yield initialize_model(vllm)


def register_if_unknown(config: dict[str, Any]) -> None:
    """Let transformers read a config whose class lies on the hub, as plain attributes."""
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    kind = config["model_type"]
    if kind in CONFIG_MAPPING or kind in _CONFIG_REGISTRY:
        return

    class Plain(PreTrainedConfig):
        model_type = kind

        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            for name, value in attributes.items():
                inner = name.endswith("_config") and name != "quantization_config"
                setattr(self, name, nested(value) if inner else with_attributes(value))

    def nested(value: dict[str, Any]) -> Any:
        known = (
            CONFIG_MAPPING[value["model_type"]] if value["model_type"] in CONFIG_MAPPING else None
        )
        return known(**value) if known else PreTrainedConfig(**value)

    def with_attributes(value: Any) -> Any:
        if isinstance(value, list):
            return [with_attributes(item) for item in value]
        return Attributes(value) if isinstance(value, dict) else value

    AutoConfig.register(kind, Plain)


class Attributes(dict):  # type: ignore[type-arg]
    """JSON's object, read as configs written in Python are: `block.attention.no_op`."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        value = self[name]
        return Attributes(value) if isinstance(value, dict) else value


def start_process_groups() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(VllmConfig()):
        meeting = f"file://{tempfile.mkdtemp()}/meeting"
        init_distributed_environment(1, 0, meeting, 0, backend="gloo")
        initialize_model_parallel(1, 1)


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
    torch.cuda.Stream = unittest.mock.MagicMock
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


if __name__ == "__main__":
    main()
