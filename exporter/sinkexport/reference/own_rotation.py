"""A model's own rotation, taken out of a model and put back with places of one's choice.

The model's rotary embedding is asked for cos and sin, and the family's own function turns with them. Nothing here knows
how a family pairs or lays out its rotary dimensions.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from sinkexport.families.adapters import find_adapter
from sinkexport.families.interface import intercept_attention, random_embeddings
from sinkexport.families.recurrent import layers_without_attention
from sinkexport.families.rope import find_rotary, replaced_rotary
from sinkexport.reference.own_attention import NoRotation, Recorder, no_reference, rotate_own

PROBE_POSITIONS = (1, 2, 5)
"""Positions of the tokens that are probed. Any but 0 do: at 0 nothing turns."""


class OwnRotation:
    """The rotation of one model, for caches of `capacity` tokens."""

    def __init__(self, model: Any, capacity: int) -> None:
        self._model = model
        self._capacity = capacity
        # A copy: some change their frequencies by the positions that they are asked for.
        found = find_rotary(model)
        self._rotary_name = "" if found is None else found[0]
        self._rotary: Any = None if found is None else copy.deepcopy(found[1])
        self._rotates: dict[torch.nn.Module, bool] = {}  # by attention module; some layers have no positions
        self._cos_sin: dict[str | None, tuple[torch.Tensor, torch.Tensor]] = {}  # [1, C, .] each, by type of layer

    def of_capacity(self, capacity: int) -> OwnRotation:
        """The same for caches of another capacity, with what was learned."""
        other = OwnRotation(self._model, capacity)
        other._rotates = self._rotates
        return other

    def learn(self) -> None:
        """Find the layers that rotate, and make sure that these are turned as the model turns them, queries and keys.

        A few tokens, random vectors in the place of embeddings, are run with the model's rotation and without;
        attention gives zeros, so that the layers see the same hidden states both times.

        Raises: UsageError.
        """
        plain = self._recorded(rotation=False)
        turned = self._recorded(rotation=True)
        far = self._recorded(rotation=False, shift=self._capacity)
        num_layers = self._model.config.get_text_config().num_hidden_layers - len(layers_without_attention(self._model))
        if len(plain) != num_layers:
            raise no_reference(f"{len(plain)} attention layers of {num_layers}", "softmax attention in every layer")
        for module, before in plain.items():
            if not all(torch.equal(x, y) for x, y in zip(before, far[module], strict=True)):
                raise no_reference("queries or keys that are a function of position beside rotation", "plain rotation")
            after = turned[module]
            self._rotates[module] = not all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
            if not self._rotates[module]:
                continue
            cos, sin = self._rotary(before[0], torch.tensor([PROBE_POSITIONS]), **self._layer_type(module))
            for name, x, y in zip(("query", "key"), before, after, strict=True):
                wanted = self.rotated(module, x, cos, sin)
                # Of each head, on its own scale: a tiny one is no excuse.
                error, size = ((t.double()).abs().amax(dim=-1) for t in (y - wanted, x))
                if not bool((error <= 64 * torch.finfo(x.dtype).eps * size).all()):
                    raise no_reference(f"a {name} that is more than a rotation of its unrotated self", "plain rotation")

    @contextlib.contextmanager
    def removed(self) -> Iterator[None]:
        """The model's rotary embedding hands out cos = 1 and sin = 0: x * 1 + rotate_half(x) * 0 is x exactly."""
        if self._rotary is None:
            yield
            return
        with replaced_rotary(self._model, {self._rotary_name: NoRotation(self._rotary)}):
            yield

    def rotates(self, module: torch.nn.Module) -> bool:
        """Whether an attention module has positions."""
        return self._rotates[module]

    def turned(self, module: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """x [B, H, n, D] turned as the model turns tokens at these places, int64 [n]."""
        return self.rotated(module, x, *self._rotary(x, places[None], **self._layer_type(module)))

    def places(self, module: Any, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own cos and sin of in-cache positions 0 .. n-1, [1, n, .], n = keys.shape[2].

        The model is asked for those of a full cache: some rotate by the length of the text, and the keys of a shorter
        one would not fit the next one's.
        """
        layer_type = self._layer_type(module)
        key = layer_type.get("layer_type")
        if key not in self._cos_sin:
            self._cos_sin[key] = self._rotary(keys, torch.arange(self._capacity)[None], **layer_type)
        cos, sin = self._cos_sin[key]
        return cos[:, : keys.shape[2]], sin[:, : keys.shape[2]]

    def _layer_type(self, module: Any) -> dict[str, str]:
        """The further argument of a rotary embedding that has frequencies for each type of layer."""
        if isinstance(getattr(self._rotary, "rope_type", None), dict):
            return {"layer_type": module.config.layer_types[module.layer_idx]}
        return {}

    def rotated(self, module: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate x [B, H, n, D] with the family's own function; cos, sin: [1, n, R or R/2].

        Some families slice off the R dimensions that turn before they call it and some leave that to the function,
        which then takes R dimensions as well.
        """
        prefix = "".join(f"{layer_type}_" for layer_type in self._layer_type(module).values())
        rotary_dim = 2 * self._rotary.get_buffer(f"{prefix}inv_freq").numel()
        adapter = find_adapter(self._model)
        if adapter is not None and adapter.rotate is not None:
            rotated: torch.Tensor = adapter.rotate(module, x, cos, sin)
            return rotated
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        turned = rotate_own(module, turned, cos, sin)
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned

    def _recorded(self, *, rotation: bool, shift: int = 0) -> dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
        """Each attention's queries and keys [1, H, n, D] for tokens `shift` after PROBE_POSITIONS, by module."""
        recorder = Recorder()
        swapped = contextlib.nullcontext() if rotation else self.removed()
        positions = torch.tensor([PROBE_POSITIONS]) + shift
        ids = torch.arange(len(PROBE_POSITIONS))[None]
        with (
            torch.no_grad(),
            random_embeddings(self._model, len(PROBE_POSITIONS), seed=1),
            intercept_attention(self._model, recorder),
            swapped,
        ):
            self._model(input_ids=ids, position_ids=positions, use_cache=False)
        return recorder.given
