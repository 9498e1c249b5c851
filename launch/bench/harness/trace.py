"""Published routing of a real model: profiles to plan on, and requests to replay. Holds no serving (replay.py).

A trace has, for each of some domains, the experts of every token of whole texts and the weight of each. Attention is
causal, so what a token is routed to depends on the tokens before it alone: a text divided anywhere into a prompt and
the answer to it is routed the same when the answer comes token by token. Traces do not say where that was, so the
last part of every text is taken for the answer.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from placement import InputError, Profile
from placement.data.arrivals import Arrivals
from placement.files import parse_json, read_bytes, show

# Of the tokens of a conversation with a chat model 15 % were generated, 22 % of the median request's (Azure LLM
# inference trace 2023, conversations: 19,366 requests).
OUTPUT_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class Trace:
    """Routing of whole texts, by domain; in each list one entry per domain.

    Attributes:
        domains: their names.
        ids: experts, integers [tokens, layers, k].
        weights: what each expert's output is multiplied with, float32 [tokens, layers, k].
        lengths: tokens of each text, int64 [texts]; they follow each other in the arrays above.
        model: whose routing it is.
        experts: experts per layer.
    """

    domains: tuple[str, ...]
    ids: list[np.ndarray]
    weights: list[np.ndarray]
    lengths: list[np.ndarray]
    model: str
    experts: int

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trace":
        """Read an `.npz` with `meta` (JSON: model, domains) and for each domain D `ids_D`, `gate_D` and `seq_lens_D`.

        Raises:
            InputError: it is missing, damaged or incomplete, or its arrays do not fit together.
        """
        arrays = _read(path)
        try:
            meta = parse_json(str(arrays["meta"]), f"{path}: meta")
            domains = tuple(str(name) for name in meta["domains"])
            model = str(meta["model"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: meta: must be JSON with model and domains ({show(error)})") from None
        if not domains:
            raise InputError(f"{path}: meta.domains: names no domain; a trace has at least one")
        ids, weights, lengths = ([_array(arrays, f"{part}_{d}", path) for d in domains] for part in _PARTS)
        for domain, i, w, n in zip(domains, ids, weights, lengths, strict=True):
            if i.ndim != 3 or i.dtype.kind not in "iu" or 0 in i.shape or i.shape[1:] != ids[0].shape[1:]:
                raise InputError(
                    f"{path}: ids_{domain} has shape {i.shape}; must be integers [tokens, layers, k] as others"
                )
            if w.shape != i.shape or w.dtype.kind != "f" or not np.isfinite(w).all():
                raise InputError(
                    f"{path}: gate_{domain} has shape {w.shape}; must be finite fractions, one for each of ids"
                )
            if n.ndim != 1 or n.dtype.kind not in "iu" or (n < 2).any() or n.sum() != len(i):
                raise InputError(f"{path}: seq_lens_{domain}: must be lengths from 2 that sum to {len(i)} tokens")
        experts = 1 + max(int(i.max()) for i in ids)
        return cls(
            domains, ids, [w.astype(np.float32) for w in weights], [n.astype(np.int64) for n in lengths], model, experts
        )

    def half(self, domain: int, later: bool) -> list[slice]:
        """Where the texts of the first or later half of a domain are in its arrays.

        Raises:
            InputError: the domain has a single text, so that its first half has none.
        """
        if len(self.lengths[domain]) < 2:
            raise InputError(f"{self.model}: domain {self.domains[domain]} has fewer than 2 texts; it has no halves")
        ends = np.cumsum(self.lengths[domain])
        texts = [slice(int(end - n), int(end)) for end, n in zip(ends, self.lengths[domain], strict=True)]
        return texts[len(texts) // 2 :] if later else texts[: len(texts) // 2]

    def profile(
        self,
        later: bool = False,
        *,
        hidden_size: int,
        expert_bytes: int,
        reserved_bytes: int | Sequence[int] = 0,
        servers: Sequence[str] | None = None,
    ) -> Profile:
        """Token-level profile of one half, each domain being the workload of one server.

        Args:
            later: the second half of each domain's texts in place of the first.
            hidden_size, expert_bytes, reserved_bytes: sizes, see `Profile`.
            servers: their names in the order of the domains; default: the domains'.

        Raises:
            InputError: there are not as many servers as domains, a domain has a single text, or ids are no sets of experts.
        """
        servers = self._one_each(servers or self.domains)
        ids, server, sequence = [], [], []
        for domain in range(len(self.domains)):
            for text in self.half(domain, later):
                ids.append(self.ids[domain][text])
                server.append(np.full(len(ids[-1]), domain))
                sequence.append(np.full(len(ids[-1]), len(sequence)))
        return Profile.from_tokens(
            np.concatenate(ids),
            np.concatenate(server),
            np.concatenate(sequence),
            servers=servers,
            experts=self.experts,
            model=self.model,
            hidden_size=hidden_size,
            expert_bytes=expert_bytes,
            reserved_bytes=reserved_bytes if isinstance(reserved_bytes, int) else tuple(reserved_bytes),
            window=f"{'second' if later else 'first'} half of each domain's texts",
        )

    def requests(
        self, arrivals: Arrivals, *, later: bool = True, output_share: float | None = OUTPUT_SHARE
    ) -> "list[ReplayRequest]":
        """The texts of one half as requests: at each arrival the next text of its server's domain, from the first again
        when all have been.

        Args:
            arrivals: when and where; server n asks for domain n.
            later: the second half of each domain's texts, else the first.
            output_share: part of each text that is the answer; None: what it is in the arrival's own lengths, whose
                sum is not reproduced, as the texts have theirs.

        Raises:
            InputError: an arrival at a server without domain; a share that leaves no prompt or no answer.
        """
        if output_share is not None and not 0 < output_share < 1:
            raise InputError(f"output share = {output_share}: must be between 0 and 1, such as {OUTPUT_SHARE}")
        if len(arrivals) and arrivals.server.max() >= len(self.domains):
            raise InputError(
                f"arrivals at server {arrivals.server.max()}: the trace has {len(self.domains)} domains, 0 first"
            )
        halves = [self.half(domain, later) for domain in range(len(self.domains))]
        taken, requests = [0] * len(halves), []
        for second, server, prompt, output in zip(*vars(arrivals).values(), strict=True):
            text = halves[server][taken[server] % len(halves[server])]
            taken[server] += 1
            ids = self.ids[server][text]
            share = output / (prompt + output) if output_share is None else output_share
            answer = min(max(1, round(share * len(ids))), len(ids) - 1)
            requests.append(
                ReplayRequest(
                    int(server),
                    float(second),
                    ids.astype(np.int32),
                    self.weights[server][text],
                    len(ids) - answer,
                    self.domains[server],
                )
            )
        return requests

    def _one_each(self, servers: Sequence[str]) -> tuple[str, ...]:
        if len(servers) != len(self.domains):
            raise InputError(
                f"{len(servers)} servers for {len(self.domains)} domains of the trace; give one server each"
            )
        return tuple(servers)


@dataclass(eq=False)
class ReplayRequest:
    """A text that enters at a server as a prompt, with the routing of all its tokens, and how far it has come.

    Prefill of the prompt gives the first token of the answer, each decode step another; the last is not fed again, so
    its routing is not used.

    Attributes:
        server: index of the server where it enters.
        arrival_s: when, on the clock of the replay.
        ids: experts, int32 [tokens, layers, k]; weights: float32 of the same shape.
        prompt: tokens of the prompt; all others are the answer.
        label: its domain.
        done: tokens whose rows have been through a step.
        first_token_s, finished_s: when the first and the last token of the answer came.
        compute_s, network_s: of the steps that it took part in; the rest of its time it waited.
    """

    server: int
    arrival_s: float
    ids: np.ndarray
    weights: np.ndarray
    prompt: int
    label: str = ""
    done: int = 0
    first_token_s: float | None = None
    finished_s: float | None = None
    compute_s: float = 0.0
    network_s: float = 0.0

    @property
    def output(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.prompt

    @property
    def latency_s(self) -> float:
        """From arrival to the last token; NaN before that."""
        return float("nan") if self.finished_s is None else self.finished_s - self.arrival_s

    @property
    def waiting_s(self) -> float:
        """What of `latency_s` it spent in no step."""
        return self.latency_s - self.compute_s - self.network_s


_PARTS = ("ids", "gate", "seq_lens")


def poisson(servers: int, gap_s: float, duration_s: float, seed: int = 0) -> Arrivals:
    """Poisson arrivals at every server, a mean of `gap_s` seconds apart, for `Trace.requests` with a share of its own."""
    return Arrivals.poisson(servers, gap_s, duration_s, [[1, 1]], seed)


def _read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    data = read_bytes(path)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception as error:  # whatever zipfile, zlib and numpy raise on a damaged archive
        raise InputError(f"{path}: not a readable .npz file: {show(' '.join(str(error).split()), 100)}") from None


def _array(arrays: dict[str, np.ndarray], name: str, path: str | os.PathLike[str]) -> np.ndarray:
    if name not in arrays:
        raise InputError(
            f"{path}: {name}: missing; a trace has {', '.join(f'{part}_D' for part in _PARTS)} for each domain D"
        )
    return arrays[name]
