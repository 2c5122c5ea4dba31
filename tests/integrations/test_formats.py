"""What other packages write and read: exported programs, ONNX, safetensors, pretrained models, adapters, int8."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import METHODS, batch, mlp, train
from torch import Tensor, nn

import stiefel

PROXIED = [m for m in METHODS if stiefel.get(m).place == "forward"]
FEW = ["own", "cayley", "retraction", "riemannian", "soft"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages
        yield
    logging.disable(logging.NOTSET)


def trained(method: str) -> nn.Module:
    model = stiefel.constrain(mlp(), method, scale="relu")
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.3), batch(4, 6), steps=3)
    return model.eval()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("released", [False, True])
def test_an_exported_program_computes_what_the_model_does(method, released):
    model, x = trained(method), batch(4, 6)
    expected = model(x).detach()
    if released:
        stiefel.release(model)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=1e-5)


@pytest.mark.sampled(8, values=False)
@pytest.mark.parametrize("method", METHODS)
def test_onnx(method, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = trained(method), batch(4, 6)
    expected = model(x).detach()
    if method in PROXIED:
        with pytest.raises(Exception, match=r"weight '0\.weight' is computed from a proxy.*stiefel\.release\(model\)"):
            torch.onnx.export(model, (x,), dynamo=True, verbose=False)
        stiefel.release(model)
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_safetensors(method, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other, x = trained(method), stiefel.constrain(mlp(seed=5), method, scale="relu").eval(), batch(4, 6)
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("method", METHODS)
def test_int8_after_release(method):
    torchao = pytest.importorskip("torchao.quantization")
    model, x = stiefel.release(trained(method)), batch(4, 6)
    expected = model(x).detach()
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    assert (model(x) - expected).abs().max() < 0.1 * expected.abs().max()


def bert(**more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertModel(transformers.BertConfig(vocab_size=30, **sizes)).eval()


@pytest.mark.sampled(6, values=False)
@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("below", [False, True])
def test_a_pretrained_model_is_saved_and_read_as_a_plain_one(method, below, tmp_path):
    model, tokens = bert(), torch.arange(6)[None]
    part = model.encoder if below else model
    stiefel.constrain(part, method, layers=lambda name, layer: "attention" in name)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    model(tokens).last_hidden_state.square().mean().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tokens)[0], model(tokens)[0], rtol=0, atol=1e-5)
    stiefel.constrain(again, method, layers=lambda name, layer: "attention" in name)  # to train on
    torch.testing.assert_close(again(tokens)[0], model(tokens)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", FEW)
def test_adapters_around_a_constrained_base_and_constrained_adapters(method, tmp_path):
    peft = pytest.importorskip("peft")
    tokens = torch.arange(6)[None]
    model = bert()
    stiefel.constrain(model, method, layers=lambda name, layer: "attention.self.query" in name)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["value"]))
    stiefel.constrain(wrapped, method, layers=lambda name, layer: "lora_A" in name)
    optimizer = stiefel.optimizer(wrapped, torch.optim.SGD, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(tokens).last_hidden_state.square().mean().backward()
        optimizer.step()
    if stiefel.get(method).feasible:
        assert stiefel.report(wrapped).worst < 1e-5
    wrapped.save_pretrained(tmp_path)
    base = bert()
    stiefel.constrain(base, method, layers=lambda name, layer: "attention.self.query" in name)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(again(tokens)[0], wrapped.eval()(tokens)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_torchs_averages_are_put_back_on_the_set(method):
    model, x = trained(method).train(), batch(4, 6)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.3)
    for seed in range(3):
        train(model, optimizer, batch(4, 6, seed=seed), steps=2)
        averaged.update_parameters(model)
    stiefel.project(averaged.module)
    if stiefel.get(method).feasible:
        assert stiefel.report(averaged.module).worst < 1e-5
    assert averaged(x).isfinite().all()


class Tokens(nn.Module):
    """Attention, whose evaluation takes another path than its training, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0, batch_first=True)
        self.rnn = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.layer(x))[0]


@pytest.mark.parametrize("method", METHODS)
def test_attention_in_evaluation_and_a_recurrent_layer_after_copies(method, tmp_path: Path):
    names = ["layer.self_attn.in_proj_weight", "layer.self_attn.out_proj", "layer.linear1", "rnn.weight_hh_l0"]
    model, x = stiefel.constrain(Tokens(), method, layers=names), batch(3, 5, 16)
    expected = model(x).detach()
    twin = copy.deepcopy(model)  # after a forward pass
    model.eval(), twin.eval()
    with torch.inference_mode():
        for each in (model, twin, stiefel.release(copy.deepcopy(model))):
            torch.testing.assert_close(each(x), expected, rtol=0, atol=2e-5)
