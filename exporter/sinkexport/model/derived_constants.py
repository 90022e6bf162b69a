"""Constants that a model's code computes of its parameters or its configuration, such as a decay rate.

The converter folds those of parameters, so that the parameters themselves are nowhere in a graph. Buffers that the code
computes of the configuration are in a graph, and in no file. The check of its weights (`sinkexport.loading.weights`)
then looks for the results.
"""

from __future__ import annotations

import torch

from sinkexport.model.trace_constants import trace_constants
from sinkexport.util.derived_constant import DerivedConstant


def derived_constants(program: torch.export.ExportedProgram) -> list[DerivedConstant]:
    """Every value of a trace that depends on constants alone and is read by what does not.

    Parameters themselves are left out, what is made of a large one, and what is made of neither parameters nor buffers.
    """
    known = trace_constants(program)
    found = []
    for node, constant in known.items():
        is_parameter = node.op == "placeholder" and bool(constant.parameters)
        is_of_model = bool(constant.parameters or constant.computed) and not is_parameter
        is_read = any(user not in known for user in node.users)
        if is_of_model and is_read and constant.value.is_floating_point():
            tensors = {name: program.state_dict[name].detach() for name in sorted(constant.parameters)}
            arrays = {name: tensor.float().numpy().copy() for name, tensor in tensors.items()}
            found.append(DerivedConstant(constant.value.float().numpy().copy(), arrays))
    return found
