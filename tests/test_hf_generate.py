"""generate() of block-sparse models with a static cache, compiled too."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_helpers import batch, llama, make, patch, sparse_layers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture
def loaded(tmp_path):
    """A small Llama as from_pretrained gives it, and the same computed densely."""
    model = make(llama)
    patch(model, 0.5)
    model.save_pretrained(tmp_path)
    dense = make(llama)
    patch(dense, 0.5, pseudo_linear=True)
    return transformers.LlamaForCausalLM.from_pretrained(tmp_path), dense


def prompt():
    return batch(rows=2, length=6)["input_ids"]


def test_a_static_cache_gives_the_same_tokens(loaded):
    model, dense = loaded
    wanted = dense.generate(prompt(), **GREEDY)
    assert torch.equal(model.generate(prompt(), **GREEDY), wanted)
    static = model.generate(prompt(), cache_implementation="static", **GREEDY)
    assert torch.equal(static, wanted)
    assert len(set(wanted[:, 6:].flatten().tolist())) > 2  # it says something


def test_compiled_with_a_static_cache_and_no_graph_break(loaded):
    model, dense = loaded
    frames = []

    def count(graph, inputs):
        frames.append(graph)
        return graph.forward

    compiling = transformers.CompileConfig(backend=count, fullgraph=True, mode=None)
    compiling._compile_all_devices = True  # transformers compiles on GPUs only, unless told
    torch.compiler.reset()
    out = model.generate(
        prompt(), cache_implementation="static", compile_config=compiling, **GREEDY
    )
    assert torch.equal(out, dense.generate(prompt(), **GREEDY))
    text = "".join(str(graph.graph) for graph in frames)
    assert text.count("block_sparse.forward") >= len(sparse_layers(model))
    assert len(frames) <= 2, "compiled again while generating"
