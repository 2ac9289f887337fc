"""model_card: a README for the Hub that says how a block-sparse model is loaded."""

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

## How to load it

Without the first line transformers does not know the layers, leaves them dense and **draws their
weights at random**, with a warning only.

```python
import pytorch_block_sparse  # registers the layers
from transformers import {kind}

model = {kind}.from_pretrained("{repo_id}")
```

## Its layers

```
{table}
```
"""


def model_card(model: PreTrainedModel, repo_id: str) -> ModelCard:
    """The card of a block-sparse model; edit its ``text``, then ``push_to_hub`` or ``save`` it.

    Push it before or after the model: ``model.push_to_hub`` keeps the text of a card that is there.

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
        repo_id=repo_id,
        table=summary(model),
    )
    return ModelCard(content)
