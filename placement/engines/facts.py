"""Facts that other engines' files lack and a profile or placement needs, from flags, a cluster or a model's config.json."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from placement.data.cluster import Cluster
from placement.data.model_shapes import ModelShape
from placement.files import InputError
from placement.units import format_bytes

# What a flag may look like, for messages.
_EXAMPLES = {"servers": "A,B,C", "top_k": "8", "hidden_size": "4096", "expert_bytes": "17MB", "name": "NAME"}


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


@dataclass(frozen=True)
class Facts:
    """What an engine's file may lack; None where nobody has said it.

    Attributes:
        shape: from `--model config.json`.
        cluster: from `--cluster`.
        servers: without a cluster, the names.
        ranks_per_server: ranks, or files, of each server; one number is for all.
        name, top_k, hidden_size, expert_bytes, reserved_bytes, experts, layers: from the flags of these names.
        first_layer: index of the first layer that has experts.
        by: field of requests whose values become the rows of a profile; None is their server.
        notes: what the result should be known for, gathered on the way.
    """

    shape: ModelShape | None = None
    cluster: Cluster | None = None
    servers: tuple[str, ...] | None = None
    ranks_per_server: tuple[int, ...] | None = None
    name: str | None = None
    top_k: int | None = None
    hidden_size: int | None = None
    expert_bytes: int | None = None
    reserved_bytes: int | None = None
    experts: int | None = None
    layers: int | None = None
    first_layer: int = 0
    by: str | None = None
    notes: list[str] = field(default_factory=list)

    def require(self, keys: Sequence[str], where: str) -> None:
        """Check that some facts are known: "servers", and fields of this class that a flag or the model gives.

        Raises:
            InputError: naming all that are not, with the flags that say them.
        """
        missing = [key for key in keys if not self._known(key)]
        if not missing:
            return
        shaped = [key for key in missing if key != "servers"]
        if len(missing) == 1:
            flag = (
                "--servers a,b,c or --cluster cluster.toml"
                if not shaped
                else f"{_flag(missing[0])}, or --model config.json"
            )
            raise InputError(f"{where}: {missing[0]}: not in the file; give {flag}")
        given = " ".join(f"{_flag(key)} {_EXAMPLES[key]}" for key in missing)
        more = [f"--model config.json says {' and '.join([', '.join(shaped[:-1])] * (len(shaped) > 1) + shaped[-1:])}"]
        more += ["--cluster cluster.toml names the servers"] * ("servers" in missing)
        raise InputError(f"{where}: {', '.join(missing)}: not in the file; give {given}; or: {', '.join(more)}")

    def _known(self, key: str) -> bool:
        if key == "servers":
            return self.cluster is not None or self.servers is not None
        return getattr(self, key) is not None or self.shape is not None

    def need(self, key: str, where: str, found: Any = None) -> Any:
        """A fact from its flag, the file or the model, in this order.

        Raises:
            InputError: nobody says it, or the file says otherwise.
        """
        given, shaped = getattr(self, key), None if self.shape is None else getattr(self.shape, key)
        if found is not None:
            for value, source in ((given, _flag(key)), (shaped, "--model")):
                if value is not None and value != found:
                    raise InputError(f"{where}: {key} = {found}, but {source} says {value}; correct one")
            return found
        self.require((key,), where)
        return shaped if given is None else given

    def names(self, where: str) -> tuple[str, ...]:
        """Names of the servers.

        Raises:
            InputError: nobody says them.
        """
        self.require(("servers",), where)
        return self.cluster.names if self.cluster is not None else self.servers or ()

    def widths(self, where: str) -> tuple[int, ...]:
        """Ranks of each server: the flag's, else the cluster's devices, else one each.

        Raises:
            InputError: the flag has another number of numbers than there are servers.
        """
        servers, given = len(self.names(where)), self.ranks_per_server
        if given is None:
            given = (1,) if self.cluster is None else tuple(len(server.devices) for server in self.cluster.servers)
        given = given * servers if len(given) == 1 else given
        if len(given) != servers:
            raise InputError(
                f"{where}: --ranks-per-server has {len(given)} numbers for {servers} servers; one, or one each"
            )
        return given

    def devices(self, where: str) -> tuple[tuple[str, int], ...]:
        """Server and index within it of every rank of a map."""
        each = zip(self.names(where), self.widths(where), strict=True)
        return tuple((name, i) for name, width in each for i in range(width))

    def server_of(self, sources: int, where: str) -> np.ndarray:
        """The server of every source, int64 [S].

        Raises:
            InputError: the numbers do not match.
        """
        servers, widths = len(self.names(where)), self.widths(where)
        if self.ranks_per_server is None and servers in (1, sources):
            widths = (sources // servers,) * servers
        if sum(widths) != sources:
            raise InputError(
                f"{where}: {sources} ranks or files for {servers} servers of {', '.join(map(str, widths))}; say with "
                "--ranks-per-server how many each server has, such as 1,1,2"
            )
        return np.repeat(np.arange(servers), widths)


def reserved_bytes(facts: Facts) -> int:
    """Bytes per device for all but experts: the flag's, else the model's other weights."""
    if facts.reserved_bytes is not None or facts.shape is None:
        return facts.reserved_bytes or 0
    size = facts.shape.other_bytes
    facts.notes.append(
        f"{format_bytes(size)} a device are reserved for the weights that are no experts; add the KV cache "
        "with --reserved-bytes"
    )
    return size
