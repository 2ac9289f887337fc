"""generate() of block-sparse models with a static cache, compiled too; the card of a model."""

import re

import pytest
import torch

transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

from huggingface_hub.errors import EntryNotFoundError  # noqa: E402

from hf_helpers import batch, bert, llama, logits, make, patch, sparse_layers  # noqa: E402
from pytorch_block_sparse import BlockSparseLinear  # noqa: E402
from pytorch_block_sparse.integrations import model_card  # noqa: E402

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


# --- the card -------------------------------------------------------------------------------------


def test_the_card_names_the_import_and_its_code_loads_the_model(tmp_path):
    model = make(bert)
    patch(model, 0.25)
    folder = str(tmp_path / "tiny")
    model.save_pretrained(folder)
    card = model_card(model, folder)
    card.save(tmp_path / "README.md")
    again = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert {"block-sparse", "pytorch_block_sparse"} <= set(again.data.tags)
    assert again.data.library_name == "transformers"
    assert "bert.encoder.layer.1.output.dense" in again.text and "0.25" in again.text
    (code,) = re.findall(r"```python\n(.*?)```", again.text, re.DOTALL)
    assert code.startswith("import pytorch_block_sparse")
    names = {}
    exec(code, names)
    assert torch.equal(logits(names["model"]), logits(model))
    layer = names["model"].bert.encoder.layer[0].output.dense
    assert type(layer) is BlockSparseLinear


def test_pushing_tags_the_card(monkeypatch):
    """What ``push_to_hub`` does with the card, without a Hub."""
    from transformers.utils import hub

    model = make(bert)
    patch(model, 0.25)

    class Nothing(huggingface_hub.ModelCard):
        @classmethod
        def load(cls, *args, **kwargs):
            raise EntryNotFoundError("no card yet")

    monkeypatch.setattr(hub, "ModelCard", Nothing)
    card = hub.create_and_tag_model_card("someone/tiny", model.model_tags)
    assert {"block-sparse", "pytorch_block_sparse"} <= set(card.data.tags)
