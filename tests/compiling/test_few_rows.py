"""Matrix products of compiled steps go through `native.linear`, and read the weights as they are."""

import pytest
import torch
from models import generate, prompt, tiny_model
from torch.nn.functional import linear, silu

import hf_kvattn
from hf_kvattn.compiling.few_rows import few_rows_options
from hf_kvattn.kernels import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="needs the native library")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def products(monkeypatch):
    """A list that grows by rows and numbers of outputs with every call of `native.linear`."""
    found, run = [], native.linear
    monkeypatch.setattr(
        native, "linear", lambda x, weights: (found.append((len(x), [len(w) for w in weights])), run(x, weights))[1]
    )
    return found


def compiled(function):
    return torch.compile(function, fullgraph=True, options=few_rows_options())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_step_has_four_products_a_layer_and_one_for_the_vocabulary(family, products):
    model, inputs = tiny_model(family, num_hidden_layers=2), prompt(batch=1)  # Qwen2 has biases
    expected, _ = generate(model, inputs, 6)
    with hf_kvattn.enabled(model, cache="static", compile=True):
        ours, _ = generate(model, inputs, 6)
    assert torch.equal(ours, expected)
    assert len(products) == 5 * (4 * 2 + 1) and {rows for rows, _ in products} == {1}
    assert [64, 32, 32] in [outs for _, outs in products] or family != "llama"


def changed(model, how):
    """Changes weights of `model` as its users do, under a compiled step."""
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        if how == "step of an optimizer":
            weight.grad = torch.randn_like(weight)
            torch.optim.SGD([weight], lr=0.1).step()
        elif how == "merge":  # as peft merges an adapter: no version counter tells
            weight.data += 0.1 * torch.randn_like(weight)
        elif how == "load_state_dict":
            model.load_state_dict({name: 1.5 * each for name, each in model.state_dict().items()})
        elif how == "swap of rows":
            weight.data.copy_(weight.data.flip(0))
        elif how == "another parameter":
            model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.flip(1).contiguous())
        else:
            model.to(torch.float64).to(torch.float32).model.layers[0].self_attn.o_proj.weight.neg_()


@pytest.mark.parametrize(
    "how", ["step of an optimizer", "merge", "load_state_dict", "swap of rows", "another parameter", "to"]
)
def test_changed_weights_are_read_as_they_are(how, products):
    torch.manual_seed(1)
    model, inputs = tiny_model(num_hidden_layers=1), prompt(batch=1)
    hf_kvattn.enable(model, cache="static", compile=True)
    _, before = generate(model, inputs, 8)
    changed(model, how)
    products.clear()
    ours, scores = generate(model, inputs, 8)
    assert products
    hf_kvattn.disable(model)
    expected, stocks = generate(model, inputs, 8)
    assert torch.equal(ours, expected)
    torch.testing.assert_close(scores, stocks, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, stocks, rtol=1e-2, atol=1e-2)  # a stale weight would show


def test_batches_up_to_32_rows_share_a_graph_and_larger_ones_go_on_with_torch(products):
    model = tiny_model(num_hidden_layers=1)
    hf_kvattn.enable(model, cache="static", compile=True)
    for batch in (2, 3, 8, 32, 33):
        products.clear()
        ids = torch.randint(0, 128, (batch, 5), generator=torch.Generator().manual_seed(batch))
        ours = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert {rows for rows, _ in products} == ({batch} if batch <= native.MAX_ROWS else set())
        with hf_kvattn.enabled(model, cache="static"):
            assert torch.equal(ours, model.generate(ids, max_new_tokens=4, do_sample=False))


def test_products_of_the_same_rows_are_one_call(products):
    torch.manual_seed(0)
    w = [torch.randn(n, 32) for n in (4, 8, 12, 16, 20)]
    bias, square = torch.randn(8), torch.randn(32, 32)

    def network(x):
        a, b, c, d, e = linear(x, w[0]), linear(x, w[1], bias), linear(x, w[2]), linear(x, w[3]), linear(x, w[4])
        return torch.cat([silu(a), b, c * 2, d, e], -1), linear(silu(linear(x, square)), square)

    x = torch.randn(3, 1, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(network)(x), network(x))
    assert sorted(len(outs) for _, outs in products) == [1, 2, 4]


def test_int8_weights_are_read_as_int8(products):
    torch.manual_seed(0)
    w, scale = torch.randint(-128, 128, (48, 64), dtype=torch.int8), torch.rand(48)
    x = torch.randn(2, 64)
    with torch.no_grad():
        ours = compiled(lambda x, w: torch.mm(x, w.t().to(x.dtype)) * scale)(x, w)
    expected = ((x.double() @ w.t().double()) * scale).float()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    assert products == [(2, [48])]


@pytest.mark.parametrize("what", ["computed weights", "columns", "float64", "many rows"])
def test_other_products_are_left_to_torch(what, products):
    torch.manual_seed(0)
    x, w = torch.randn(2, 16), torch.randn(8, 16)
    if what == "float64":
        x, w = x.double(), w.double()
    if what == "many rows":
        x = x.repeat(20, 1)
    computed = {"computed weights": lambda x, w: linear(x, w.exp()), "columns": lambda x, w: x @ w.t().contiguous()}
    function = computed.get(what, linear)
    if what == "columns":
        w = w.t().contiguous().t()
    with torch.no_grad():
        torch.testing.assert_close(compiled(function)(x, w), function(x, w))
    assert not products


def test_a_user_s_own_options_stand(products):
    from transformers import CompileConfig

    from hf_kvattn.compiling.step import default_config

    model, inputs = tiny_model(num_hidden_layers=1), prompt(batch=1)
    expected, _ = generate(model, inputs, 4)
    for config, ours in ((CompileConfig(mode="default"), True), (CompileConfig(backend="eager", mode=None), False)):
        products.clear()
        with hf_kvattn.enabled(model, cache="static", compile=True):
            found, _ = generate(model, inputs, 4, compile_config=config)
        assert torch.equal(found, expected) and bool(products) is ours, config
    assert default_config().options is None
