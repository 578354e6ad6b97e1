"""What goes wrong in a family's own code is one message that says where, exit code 3; what goes
wrong in that of ckptq stays what it is."""

import json
import shutil
import sys

import pytest
from calibrate_models import samples_of
from remote_code import save
from tiny.rows import token_rows

from ckptq.calibrate.run import calibrate
from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import MachineError, SourceError

SAMPLES = samples_of(token_rows([12, 9]))
ELSE = "try another version, or use a weights-only scheme"


def run(folder):
    return calibrate(open_checkpoint(folder), SAMPLES, batch_size=1, trust_remote_code=True)


@pytest.fixture(autouse=True, scope="module")
def modules_of_their_own(tmp_path_factory):
    """transformers copies model code into a cache, from which it is imported."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in sys.modules if n.split(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
        yield


def test_code_that_works_is_run(tmp_path):
    assert run(save(tmp_path / "model", "Working")).attention_class == "LlamaAttention"


@pytest.mark.parametrize(
    ("name", "where", "words"),
    [
        ("Keyless", {"layer": "{}['conv_state']"}, r"in model\.layers\.1: KeyError: 'conv_state'"),
        ("Typed", {"layer": "len(3)"}, r"in model\.layers\.1: object of type 'int'"),
        ("Shaped", {"layer": "torch.ones(2, 3) @ torch.ones(2, 3)"}, r"in model\.layers\.1: mat1"),
        ("Silent", {"layer": "raise NotImplementedError"}, r"layers\.1: NotImplementedError"),
        ("Initial", {"init": "raise ValueError('rope is odd')"}, "own initialization: rope is odd"),
        ("Decoder", {"decoder": "raise AttributeError('none')"}, "search for its decoder: none"),
    ],
)
def test_where_it_fails_is_said_and_what_else_there_is(tmp_path, name, where, words):
    folder = save(tmp_path / "model", name, **where)
    with pytest.raises(SourceError, match=f"{name}ForCausalLM.*{words}.*{ELSE}") as refused:
        run(folder)
    assert refused.value.exit_code == 3
    assert str(refused.value).startswith(f"{folder}: transformers ")
    assert "\n" not in str(refused.value)


def test_too_little_memory_is_the_machine_s(tmp_path):
    folder = save(tmp_path / "model", "Greedy", layer="raise torch.OutOfMemoryError('2 GiB')")
    with pytest.raises(MachineError, match=r"layers\.1: out of memory: 2 GiB"):
        run(folder)


def test_code_that_does_not_load_is_named(tmp_path):
    folder = save(tmp_path / "model", "Broken")
    (folder / "modeling_broken.py").write_text("import no_such_package_at_all\n")
    with pytest.raises(SourceError, match=r"model code \(modeling_broken\.Broken.*does not load: "):
        run(folder)


@pytest.mark.parametrize(
    "rope", [{"rope_type": "mystery", "rope_theta": 1e4}, {"rope_type": "yarn", "factor": "much"}]
)
def test_rope_that_transformers_does_not_know(saved, tmp_path, rope):
    shutil.copytree(saved("qwen3").path, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_parameters": rope}))
    with pytest.raises(SourceError, match=r"Qwen3ForCausalLM|config\.json"):
        run(tmp_path / "model")


def test_a_mistake_of_ckptq_s_is_none_of_the_family_s(saved, monkeypatch):
    """The tap runs inside the family's forward."""
    monkeypatch.setattr("ckptq.calibrate.statistics.heads", None)
    with pytest.raises(TypeError, match="not callable"):
        run(saved("llama").path)
