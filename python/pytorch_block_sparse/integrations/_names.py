"""Where a layer of a checkpoint is in the model that loads it.

Prefixes come and go (a base model loads the checkpoint of one with a head), and some families have
renamed layers since. The rules are those by which transformers finds the place of a dense weight.
"""

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class Names:
    """Translates names; made while the layers of `model` are still dense."""

    def __init__(self, model: PreTrainedModel) -> None:
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._keys = model.state_dict()

    def in_model(self, name: str) -> str | None:
        """The layer that `name` of the checkpoint is here, or None."""
        key = self._key(f"{name}.weight")
        return None if key is None else key.removesuffix(".weight")

    def any_in_model(self, keys: list[str], key: str) -> bool:
        """True if one of the `keys` of a checkpoint is `key` here."""
        return any(self._key(other) == key for other in keys)

    def _key(self, key: str) -> str | None:
        renamed, merged = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._keys
        )
        if merged is None and renamed in self._keys:
            return renamed
        plain, _ = rename_source_key(key, [], [], self._prefix, self._keys)
        return plain if plain in self._keys else None
