"""BlockSparseLinear in training, inside torch's own modules, and under torch's tools."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pytorch_block_sparse import BlockSparseLinear, Pattern

pytestmark = pytest.mark.usefixtures("one_thread")


def test_learns_a_block_sparse_map():
    torch.manual_seed(0)
    pattern = Pattern.random((48, 64), 0.4, (16, 16))
    teacher = BlockSparseLinear(64, 48, pattern=pattern)
    student = BlockSparseLinear(64, 48, pattern=pattern)
    x = torch.randn(256, 64)
    target = teacher(x).detach()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(student(x), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-5
    torch.testing.assert_close(student.values, teacher.values, atol=0.02, rtol=0)


def encoder_with_sparse_layers(batch_first=True):
    """A TransformerEncoderLayer, and the same one with block-sparse linear layers."""
    dense = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=batch_first)
    sparse = copy.deepcopy(dense)
    sparse.linear1 = BlockSparseLinear.from_dense(dense.linear1, 1.0)
    sparse.linear2 = BlockSparseLinear.from_dense(dense.linear2, 1.0)
    return dense, sparse


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_transformer_encoder_layer(train, grad):
    # In evaluation without gradients nn.TransformerEncoderLayer reads linear1.weight itself.
    dense, sparse = encoder_with_sparse_layers()
    x = torch.randn(2, 5, 64)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(sparse.train(train)(x), dense.train(train)(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_transformer_encoder_with_padding(train, grad):
    dense, sparse = (nn.TransformerEncoder(one, 2) for one in encoder_with_sparse_layers())
    x = torch.randn(2, 5, 64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(grad):
        y, wanted = (
            one.train(train)(x, src_key_padding_mask=padding)[~padding] for one in (sparse, dense)
        )
    torch.testing.assert_close(y, wanted)


def test_gradients_reach_values_in_a_transformer_encoder_layer():
    _, sparse = encoder_with_sparse_layers()
    sparse(torch.randn(2, 5, 64)).square().sum().backward()
    assert sparse.linear1.values.grad.any() and sparse.linear2.values.grad.any()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_multihead_attention_beside_sparse_layers(train):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            self.project = BlockSparseLinear(64, 64, density=0.5)

        def forward(self, x):
            x = self.project(x)
            return self.attention(x, x, x, need_weights=False)[0]

    block = Block().train(train)
    y = block(torch.randn(2, 5, 64))
    y.square().sum().backward()
    assert y.shape == (2, 5, 64) and block.project.values.grad.any()


def mlp(dtype=torch.float32):
    return nn.Sequential(
        BlockSparseLinear(48, 64, density=0.5, block_shape=(16, 16), dtype=dtype),
        nn.GELU(),
        BlockSparseLinear(64, 40, density=0.5, block_shape=(16, 16), dtype=dtype),
    )


def test_functional_call_uses_what_it_is_given():
    a, b = mlp(), mlp()
    x = torch.randn(5, 48)
    state = dict(b.named_parameters()) | dict(b.named_buffers())
    before = a(x)
    assert torch.equal(torch.func.functional_call(a, state, (x,)), b(x))
    assert torch.equal(a(x), before)

    zeros = {"2.values": torch.zeros_like(a[2].values), "2.bias": torch.ones(40)}
    assert torch.equal(torch.func.functional_call(a, zeros, (x,)), torch.ones(5, 40))


def test_activation_checkpointing_gives_the_same_gradients():
    model, x = mlp(torch.float64), torch.randn(5, 48, dtype=torch.float64)

    def gradients(run):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        run(inputs).square().sum().backward()
        return [inputs.grad, *(p.grad for p in model.parameters())]

    plain = gradients(model)
    for reentrant in (True, False):
        again = gradients(partial(checkpoint, model, use_reentrant=reentrant))
        assert all(map(torch.equal, plain, again))


@pytest.mark.slow
def test_compiles_to_one_graph_and_follows_the_pattern():
    torch.compiler.reset()
    model = mlp()
    compiled = torch.compile(model, fullgraph=True)
    for tokens in (5, 9):
        x = torch.randn(tokens, 48)
        torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for compiled_one, eager in zip(gradients, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(compiled_one, eager)

    model.load_state_dict(mlp().state_dict())  # another pattern, the same number of blocks
    torch.testing.assert_close(compiled(x), model(x))
