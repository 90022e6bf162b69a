"""Put copies of a traced decoder layer where a trace has left layers out that differ in their parameters alone.

Each copy looks up its own parameters, buffers and states by name. Whatever else a layer reads must come from its hidden
states, or be the same for all layers: anything that would pass from layer to layer in another way is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from sinkexport.graph.operators import DOMAIN, LAYER_MARK
from sinkexport.model.layer_kinds import LayerRepeats
from sinkexport.model.repeated_layers import CannotRepeatError, Mark

CONSTANT_KIND = "CONSTANT_TENSOR"
KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
"""What torch's converter notes of a constant: this kind is a tensor that the model's code makes."""

MODEL = "model."
"""Prefix of the names of a model's parameters: the model is a part of the traced step."""

SHARED = ("frequency_", "alibi_slopes")
"""Beginnings of the names of the traced step's own constants that all layers of a kind share."""

Digest = bytes


def stamp_layers(
    model: ir.Model, repeats: LayerRepeats, tensors: Mapping[str, torch.Tensor], state_layers: Sequence[int]
) -> None:
    """Fill in the layers that are left out of a graph just converted, and remove all marks.

    tensors: parameters and buffers of the trace by name, those of layers that are left out among them.
    state_layers: layer of each state, in the order of the trace's inputs, see `build_graph`.

    Raises: CannotRepeatError if the two traced layers of a kind differ, or a copy might be something else than the
        layer.
    """
    stamps = _Stamps(model.graph, repeats, tensors, state_layers)
    for template, first in repeats.first_of.items():
        body = stamps.body(template)
        if body.digests() != stamps.body(first).digests():
            raise CannotRepeatError(f"the traces of layers {first} and {template} differ")
        body.check_closed()
        for layer, its_template in repeats.template_of.items():
            if its_template == template:
                body.copy_to(layer)
    stamps.remove_marks()


class _Stamps:
    """A graph with marks."""

    def __init__(
        self,
        graph: ir.Graph,
        repeats: LayerRepeats,
        tensors: Mapping[str, torch.Tensor],
        state_layers: Sequence[int],
    ) -> None:
        self.graph = graph
        self.repeats = repeats
        self._tensors = tensors
        self.order = {node: number for number, node in enumerate(graph)}
        self.marks = {_role(node): node for node in graph if _is_mark(node)}
        self.states: dict[int, list[int]] = {}  # by layer, indices of its states among all
        for index, layer in enumerate(state_layers):
            self.states.setdefault(layer, []).append(index)
        self.state_of = {graph.inputs[2 + index]: (layer, index) for index, layer in enumerate(state_layers)}
        self._is_free: dict[ir.Value, bool] = {}
        self._shared_digests: dict[ir.Value, Digest] = {}

    def mark(self, layer: int, role: Mark) -> ir.Node:
        """The node of a mark.

        Raises: CannotRepeatError if the converter has lost it.
        """
        if (layer, role) not in self.marks:
            raise CannotRepeatError(f"no mark of layer {layer}")
        return self.marks[layer, role]

    def body(self, layer: int) -> _Body:
        """The nodes of a layer that is traced."""
        begin, end = self.mark(layer, Mark.BEGIN), self.mark(layer, Mark.END)
        nodes = [node for node, place in self.order.items() if self.order[begin] < place < self.order[end]]
        return _Body(self, layer, begin, end, nodes)

    def layer_of_weight(self, name: str) -> int | None:
        """Layer whose parameter a constant is, by its name."""
        prefix = f"{MODEL}{self.repeats.path}."
        number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        return int(number) if number.isdecimal() else None

    def is_free(self, value: ir.Value) -> bool:
        """Whether a value depends on positions and constants alone, and on nothing of a layer."""
        if value not in self._is_free:
            node = value.producer()
            if node is None:
                name = str(value.name)
                is_step_own = not name.startswith((MODEL, *SHARED)) and _is_parameter(value)
                is_of_layer = value.is_initializer() and self.layer_of_weight(name) is not None
                is_input = value in self.state_of or value is self.graph.inputs[0]
                self._is_free[value] = not (is_input or is_of_layer or is_step_own)
            else:
                inputs = (one for one in node.inputs if one is not None)
                self._is_free[value] = not _is_mark(node) and all(self.is_free(one) for one in inputs)
        return self._is_free[value]

    def shared_digest(self, value: ir.Value) -> Digest:
        """Of a value that `is_free`."""
        if value not in self._shared_digests:
            node = value.producer()
            if node is None:
                is_constant = value.metadata_props.get(KIND) == CONSTANT_KIND and value.const_value is not None
                content = value.const_value.tobytes() if is_constant else str(value.name).encode()  # type: ignore[union-attr]
                self._shared_digests[value] = _digest(b"constant" if is_constant else b"name", content, _type(value))
            else:
                inputs = [b"" if one is None else self.shared_digest(one) for one in node.inputs]
                self._shared_digests[value] = _digest_of_node(node, inputs, value.index())
        return self._shared_digests[value]

    def weight(self, name: str, like: ir.Value) -> ir.Value | None:
        """The constant of a parameter or buffer, made where the trace had no use for it. None: there is no such tensor.

        like: the same of another layer.
        """
        if name not in self.graph.initializers and name in self._tensors and like.const_value is not None:
            make: Any = type(like.const_value)  # the converter's own view of a torch tensor, which copies nothing
            tensor = make(self._tensors[name], name=name)
            value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            value.metadata_props.update(like.metadata_props)
            self.graph.register_initializer(value)
        return self.graph.initializers.get(name)

    def remove_marks(self) -> None:
        """Let whatever reads a mark read what it was put at."""
        for mark in self.marks.values():
            ir.convenience.replace_all_uses_with(mark.outputs[0], mark.inputs[0])  # type: ignore[arg-type]
            self.graph.remove(mark, safe=True)


class _Body:
    """The nodes between the marks of a layer."""

    def __init__(self, stamps: _Stamps, layer: int, begin: ir.Node, end: ir.Node, nodes: list[ir.Node]) -> None:
        self._stamps = stamps
        self._layer = layer
        self._begin = begin
        self._end = end
        self._nodes = nodes
        self._inside = {output for node in nodes for output in node.outputs}

    def _results(self) -> list[ir.Value]:
        """Hidden states at the end, and next states."""
        outputs = self._stamps.graph.outputs
        after = [outputs[1 + index] for index in self._stamps.states[self._layer]]
        return [*(value for value in self._end.inputs if value is not None), *after]

    def digests(self) -> list[Digest]:
        """Digests of results: equal in two layers if these compute the same of their parameters, states and inputs."""
        known: dict[ir.Value, Digest] = {}

        def digest(value: ir.Value | None) -> Digest:
            if value is None:
                return b""
            if value in known:
                return known[value]
            return self._leaf_digest(value)

        for node in self._nodes:
            inputs = [digest(value) for value in node.inputs]
            is_free = all(value is None or self._stamps.is_free(value) for value in node.inputs)
            for output in node.outputs:  # what all layers share may be in any of them
                known[output] = (
                    self._stamps.shared_digest(output) if is_free else _digest_of_node(node, inputs, output.index())
                )
        return [digest(value) for value in self._results()]

    def _leaf_digest(self, value: ir.Value) -> Digest:
        """Of a value that the layer reads.

        Raises: CannotRepeatError if it is another layer's.
        """
        stamps = self._stamps
        if value is self._begin.outputs[0]:
            return _digest(b"hidden", _type(value))
        if value in stamps.state_of and stamps.state_of[value][0] == self._layer:
            number = stamps.states[self._layer].index(stamps.state_of[value][1])
            return _digest(b"state", str(number).encode(), _type(value))
        if value.is_initializer() and stamps.layer_of_weight(str(value.name)) == self._layer:
            name = str(value.name).removeprefix(MODEL + stamps.repeats.prefix(self._layer))
            return _digest(b"own", name.encode(), _type(value))
        if stamps.is_free(value):
            return stamps.shared_digest(value)
        raise CannotRepeatError(f"layer {self._layer} reads '{value.name}', which is not its own")

    def check_closed(self) -> None:
        """Raises: CannotRepeatError if more than its results is read elsewhere, or a node has a graph of its own."""
        inside, results = set(self._nodes), set(self._results())
        for node in self._nodes:
            kinds = {attribute.type for attribute in node.attributes.values()}
            if kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
                raise CannotRepeatError(f"layer {self._layer} has a {node.op_type}")
            for output in node.outputs:
                is_read = any(use.node not in inside and use.node is not self._end for use in output.uses())
                if is_read or (output.is_graph_output() and output not in results):
                    raise CannotRepeatError(f"'{output.name}' of layer {self._layer} is read elsewhere")

    def copy_to(self, layer: int) -> None:
        """Put the nodes of a layer of the same kind where it was left out."""
        stamps, place = self._stamps, self._stamps.mark(layer, Mark.LEFT_OUT)
        hidden = place.inputs[0]
        if hidden is None:
            raise CannotRepeatError(f"the mark of layer {layer} has no input")
        own: dict[ir.Value | None, ir.Value | None] = {self._begin.outputs[0]: hidden, None: None}
        copies = []
        for node in self._nodes:
            inputs = [own[value] if value in own else self._counterpart(value, layer) for value in node.inputs]
            copies.append(_copied(node, inputs, layer))
            own |= zip(node.outputs, copies[-1].outputs, strict=True)
        stamps.graph.insert_before(place, copies)
        (result, *before), (_, *after) = self._results(), [None, *stamps.states[layer]]
        if len(before) != len(after):
            raise CannotRepeatError(f"layer {layer} has other states than layer {self._layer}")
        for value, index in zip(before, after, strict=True):
            stamps.graph.outputs[1 + index] = own[value] if value in own else self._counterpart(value, layer)  # type: ignore[assignment]
        place.replace_input_with(0, own[result] if result in own else self._counterpart(result, layer))

    def _counterpart(self, value: ir.Value | None, layer: int) -> ir.Value:
        """What `layer` reads where this one reads `value`.

        Raises: CannotRepeatError if there is none of the same type.
        """
        stamps, found = self._stamps, value
        if value is None:
            raise CannotRepeatError("an input is missing")
        if value in stamps.state_of:
            number = stamps.states[self._layer].index(stamps.state_of[value][1])
            found = stamps.graph.inputs[2 + stamps.states[layer][number]]
        elif value.is_initializer() and stamps.layer_of_weight(str(value.name)) == self._layer:
            name = stamps.repeats.renamed(str(value.name), self._layer, layer)
            found = stamps.weight(name, value)
        elif not stamps.is_free(value):
            raise CannotRepeatError(f"layer {self._layer} reads '{value.name}', which is not its own")
        if found is None or _type(found) != _type(value):
            raise CannotRepeatError(f"layer {layer} has nothing like '{value.name}'")
        return found


def _is_mark(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, LAYER_MARK)


def _role(mark: ir.Node) -> tuple[int, Mark]:
    """Layer and role of a mark."""
    return mark.attributes["layer"].as_int(), Mark(mark.attributes["role"].as_int())


def _is_parameter(value: ir.Value) -> bool:
    """Whether a constant is a parameter or buffer, of the model or of the step around it."""
    return value.is_initializer() and value.metadata_props.get(KIND) != CONSTANT_KIND


def _copied(node: ir.Node, inputs: Sequence[ir.Value | None], layer: int) -> ir.Node:
    """A node like `node`, with other inputs. Names say for which layer it is."""
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
        name=f"{node.name}.{layer}",
    )
    for before, after in zip(node.outputs, copy.outputs, strict=True):
        after.name, after.shape, after.type = f"{before.name}.{layer}", before.shape, before.type
    return copy


def _type(value: ir.Value) -> bytes:
    """Type and shape of a value."""
    return repr((value.dtype, value.shape)).encode()


def _digest_of_node(node: ir.Node, inputs: Iterable[Digest], output: int | None) -> Digest:
    """Of one output of a node."""
    attributes = [_attribute(one) for _, one in sorted(_attributes(node).items())]
    operator = repr((node.domain, node.op_type, node.overload, len(node.outputs), output)).encode()
    return _digest(operator, *attributes, b"inputs", *inputs)


def _attributes(node: ir.Node) -> Mapping[str, ir.Attr]:
    return node.attributes


def _attribute(attribute: ir.Attr) -> bytes:
    content = attribute.value.tobytes() if attribute.type == ir.AttributeType.TENSOR else b""
    value = (attribute.value.dtype, attribute.value.shape) if content else attribute.value
    return _digest(repr((attribute.name, attribute.type, value)).encode(), content)


def _digest(*parts: bytes) -> Digest:
    """Of the parts and their lengths."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.digest()
