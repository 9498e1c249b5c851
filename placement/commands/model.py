"""`python -m placement model`: sizes from a Hugging Face `config.json`."""

import argparse
import json

from placement.commands.inputs import add_json
from placement.data.model_shapes import BITS, ModelShape
from placement.text_table import print_table, print_text
from placement.units import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="config.json of a model, or its folder")
    parser.add_argument("--dtype", choices=BITS, metavar="D", help=f"type of the experts: {', '.join(BITS)}")
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print shapes and sizes.

    Raises:
        InputError: the configuration cannot be used.
    """
    shape = ModelShape.from_config(arguments.config, arguments.dtype)
    layers, number = len(shape.layers), len(shape.layers) * shape.experts
    sizes = {
        "expert_bytes": shape.expert_bytes,
        "all_experts_bytes": shape.expert_bytes * number,
        "other_bytes": shape.other_bytes,
        "total_bytes": shape.bytes,
    }
    parameters = (shape.expert_parameters, shape.expert_parameters * number, shape.other_parameters, shape.parameters)
    if arguments.json:
        keys = ("name", "family", "hidden_layers", "experts", "top_k", "hidden_size", "dtype", "parameters")
        head = {key: getattr(shape, key) for key in keys}
        more = {"expert_parameters": shape.expert_parameters, "other_parameters": shape.other_parameters}
        print(json.dumps({**head, "layers": layers, "layer_indices": shape.layers, **more, **sizes}))
        return
    count = (
        f"{shape.parameters / 1e9:.1f} billion" if shape.parameters >= 1e9 else f"{shape.parameters / 1e6:.1f} million"
    )
    print(f"{shape.name}: {shape.family}, {count} parameters")
    print_text(
        f"{layers} of {shape.hidden_layers} layers have {shape.experts} experts, {shape.top_k} for each token; hidden size "
        f"{shape.hidden_size}; experts in {shape.dtype}"
    )
    names = ("one expert", f"all {number} experts", "everything else", "the model")
    rows = [
        [name, f"{count:,}", f"{size:,}", format_bytes(size)]
        for name, count, size in zip(names, parameters, sizes.values(), strict=True)
    ]
    print_table(["", "parameters", "bytes", "size"], rows)
