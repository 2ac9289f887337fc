"""model_card: a README for the Hub that says how a block-sparse model is loaded.

``push_to_hub`` names the import in whatever card it pushes.
"""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..view import summary
from .config import TAGS

_TEXT = """---
{data}
---

# {title}

{title} is a `{kind}` whose linear layers are block sparse: of their weights only some blocks are
stored and multiplied.

{loading}
## Its layers

```
{table}
```
"""

_LOADING = """## How to load it

Without the first line transformers does not know the layers, leaves them dense and **draws their
weights at random**, with a warning only.

```python
import pytorch_block_sparse  # registers the layers
from transformers import {kind}

model = {kind}.from_pretrained("{repo_id}")
```
"""


def _loading(model: PreTrainedModel, repo_id: str) -> str:
    return _LOADING.format(kind=type(model).__name__, repo_id=repo_id)


def model_card(model: PreTrainedModel, repo_id: str) -> ModelCard:
    """The card of a block-sparse model; edit its ``text``, then ``push_to_hub`` or ``save`` it.

    Push it before or after the model: ``model.push_to_hub`` keeps the text of a card that is there,
    and adds how the model is loaded where the text does not name the import.

    Args:
        model: a model with block-sparse layers.
        repo_id: its place on the Hub, as in ``from_pretrained``.
    """
    tags = [*TAGS, *(tag for tag in model.model_tags or [] if tag not in TAGS)]
    data = ModelCardData(library_name="transformers", tags=tags)
    content = _TEXT.format(
        data=data.to_yaml(),
        title=repo_id.rpartition("/")[2],
        kind=type(model).__name__,
        loading=_loading(model, repo_id),
        table=summary(model),
    )
    return ModelCard(content)


def name_the_import(model: PreTrainedModel, path: Path, repo_id: str) -> None:
    """Puts how `model` is loaded below the title of the card at `path`, if that is not in it."""
    card = ModelCard.load(path)
    if "import pytorch_block_sparse" not in card.text:
        section = f"\n{_loading(model, repo_id)}"
        card.text = re.sub(r"\A\s*(# .*\n)?", lambda title: title[0] + section, card.text, count=1)
        card.save(path)
