"""The package's list of its modules, and what the pages show of it."""

import pkgutil
import re
import runpy
from functools import partial
from pathlib import Path

import moe_optimized
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def test_the_package_lists_its_modules():
    names = {module.name for module in pkgutil.iter_modules(moe_optimized.__path__)}
    rows = re.findall(r"^\| (`.*?) \|", moe_optimized.__doc__, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(names)


def test_the_example_of_a_layer(assert_close, monkeypatch):
    torch._dynamo.reset()
    # The way to machine code is long; it is gone once, in test_operators.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = runpy.run_path(str(EXAMPLES / "fast_layer.py"))
    moe, compiled = found["moe"], found["compiled"]
    assert type(moe).__module__ == "moe_optimized.modules"
    assert moe.tokens_per_expert.sum() == 2 * 16
    x = torch.randn(1, 16, 64)
    assert_close(compiled(x).output, moe(x).output)


def test_the_example_of_a_model(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    stored = transformers.MixtralForCausalLM(config).eval()
    stored.save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    model = runpy.run_path(str(EXAMPLES / "fast_transformers.py"))["model"]
    assert model.config._experts_implementation == "moespec"
    ids = torch.randint(0, 32, (1, 6))
    torch.testing.assert_close(model(ids).logits, stored(ids).logits)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config._experts_implementation != "moespec"
