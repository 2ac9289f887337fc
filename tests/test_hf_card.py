"""The card of a model, and what push_to_hub uploads: without a network, stopped at the commit."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

from huggingface_hub.errors import EntryNotFoundError  # noqa: E402
from transformers.utils import hub  # noqa: E402

from hf_helpers import bert, logits, make, patch  # noqa: E402
from pytorch_block_sparse import BlockSparseLinear  # noqa: E402
from pytorch_block_sparse.integrations import model_card  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TAGS = {"block-sparse", "pytorch_block_sparse"}


def test_the_card_names_the_import_and_its_code_loads_the_model(tmp_path):
    model = make(bert)
    patch(model, 0.25)
    folder = str(tmp_path / "tiny")
    model.save_pretrained(folder)
    card = model_card(model, folder)
    card.save(tmp_path / "README.md")
    again = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert set(again.data.tags) >= TAGS
    assert again.data.library_name == "transformers"
    assert "bert.encoder.layer.1.output.dense" in again.text and "0.25" in again.text
    (code,) = re.findall(r"```python\n(.*?)```", again.text, re.DOTALL)
    assert code.startswith("import pytorch_block_sparse")
    names = {}
    exec(code, names)
    assert torch.equal(logits(names["model"]), logits(model))
    layer = names["model"].bert.encoder.layer[0].output.dense
    assert type(layer) is BlockSparseLinear


# --- push_to_hub ----------------------------------------------------------------------------------


class Hub:
    """What transformers asks of the Hub: a commit lands in `folder`, where the card is found."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **options):
        self.repo_id = repo_id
        for operation in operations:
            target = self.folder / operation.path_in_repo
            with operation.as_file() as source:
                target.write_bytes(source.read())


@pytest.fixture
def a_hub(tmp_path, monkeypatch):
    fake = Hub(tmp_path / "hub")
    fake.folder.mkdir()

    class Card(huggingface_hub.ModelCard):
        @classmethod
        def load(cls, *args, **options):
            if not (fake.folder / "README.md").exists():
                raise EntryNotFoundError("no card yet")
            return super().load(fake.folder / "README.md")

    monkeypatch.setattr(hub, "ModelCard", Card)
    for module in (hub, transformers.modeling_utils):
        monkeypatch.setattr(module, "hf_api", lambda *args, **options: fake)
    return fake


def card_in(folder):
    return huggingface_hub.ModelCard.load(folder / "README.md")


def by_method(model, folder):
    model.push_to_hub("someone/tiny", tags=["mine"])


def while_saving(model, folder):
    model.save_pretrained(folder / "saved", push_to_hub=True, repo_id="someone/tiny")


@pytest.mark.parametrize("push", [by_method, while_saving])
def test_what_is_pushed_can_be_loaded(push, a_hub, tmp_path):
    model = make(bert)
    patch(model, 0.25)
    push(model, tmp_path)
    assert a_hub.repo_id == "someone/tiny"
    pushed = {path.name for path in a_hub.folder.iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} <= pushed
    config = json.loads((a_hub.folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "block_sparse"
    assert config["layers"]["bert.encoder.layer.1.output.dense"] == [16, 16]

    card = card_in(a_hub.folder)
    assert set(card.data.tags) >= TAGS
    assert ("mine" in card.data.tags) == (push is by_method)
    (code,) = re.findall(r"```python\n(import pytorch_block_sparse.*?)```", card.text, re.DOTALL)
    names = {}
    exec(code.replace("someone/tiny", str(a_hub.folder)), names)
    assert torch.equal(logits(names["model"]), logits(model))


def test_the_text_of_a_card_that_is_there_stays(a_hub):
    model = make(bert)
    patch(model, 0.25)
    text = "---\nlicense: mit\n---\n# Mine\n\nAs it was.\n"
    (a_hub.folder / "README.md").write_text(text)
    model.push_to_hub("someone/tiny")
    once = card_in(a_hub.folder)
    assert once.data.license == "mit" and set(once.data.tags) >= TAGS
    assert once.text.startswith("# Mine\n\n## How to load it\n")
    assert once.text.endswith("\nAs it was.\n")
    model.push_to_hub("someone/tiny")
    assert card_in(a_hub.folder).text == once.text

    card = model_card(model, "someone/tiny")
    card.save(a_hub.folder / "README.md")
    model.push_to_hub("someone/tiny")
    assert card_in(a_hub.folder).text == card.text


def test_the_card_of_a_dense_model_is_left_alone(a_hub):
    make(bert).push_to_hub("someone/tiny")
    card = card_in(a_hub.folder)
    assert "pytorch_block_sparse" not in card.content
