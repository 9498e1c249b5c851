"""Made-up figures in the demo's format: plausible, of any number of servers, layers, experts and migrations."""

import numpy as np

DOMAINS = ("code", "prose", "arithmetic")
EXPERT_BYTES, RESERVED_BYTES = 98304, 3_200_000
_PHASES = ("uniform", "dance", "dance, workloads swapped", "dance, planned again")
_LOCAL = (0.34, 0.7, 0.45, 0.68)


class _Demo:
    """One demo: every server has its own experts, which move with the workload."""

    def __init__(self, servers: int, layers: int, experts: int, migrations: int, seconds: float, seed: int) -> None:
        self.rng, self.grid = np.random.default_rng(seed), (layers, experts)
        self.names = [f"edge-{chr(97 + s)}" for s in range(servers)]
        self.devices = [(self.names[s], d) for s in range(servers) for d in range(1 + (s == servers - 1))]
        self.taste = self.rng.dirichlet(np.full(experts, 0.4), (servers, layers))
        self.traded = np.roll(self.taste, -1, 0)
        self.phase_names = _PHASES[: 2 * migrations or 1]
        self.start = np.linspace(0, seconds, len(self.phase_names) + 1)
        turn = [0, 0, 1, 1]
        phases = range(len(self.phase_names))
        self.works = [{n: DOMAINS[(s + turn[p]) % 3] for s, n in enumerate(self.names)} for p in phases]
        self.ratios = [{n: _LOCAL[p] + 0.04 * s / servers for s, n in enumerate(self.names)} for p in phases]
        self.times = np.linspace(0.5, seconds, 160)
        self.migrations = migrations

    def placed(self, label: str, at: float, weights: np.ndarray) -> dict:
        held = np.zeros((len(self.devices), *self.grid), bool)
        for i, (name, _) in enumerate(self.devices):
            score = weights[self.names.index(name)] * self.rng.uniform(0.8, 1.2, self.grid)
            part = (1.3 + 0.5 * (i % 2)) / len(self.devices)
            held[i] = score >= np.quantile(score, max(1 - part, 0), axis=1, keepdims=True)
        alone, (layers, experts) = ~held.any(0), self.grid
        somewhere = self.rng.integers(len(self.devices), size=self.grid)
        held[somewhere, np.arange(layers)[:, None], np.arange(experts)] |= alone
        devices = [
            {
                "server": n,
                "device": d,
                "experts": [np.flatnonzero(h).tolist() for h in held[i]],
                "resident_bytes": int(held[i].sum()) * EXPERT_BYTES,
                "budget_bytes": (int(held[i].sum()) + 3) * EXPERT_BYTES,
            }
            for i, (n, d) in enumerate(self.devices)
        ]
        return {"label": label, "at_s": at, "devices": devices}

    def placements(self) -> list[dict]:
        found = [self.placed("uniform", 0.0, np.ones_like(self.taste))]
        if self.migrations:
            found.append(self.placed("dance", self.start[1], self.taste))
            found.append(self.placed("dance, after the swap", self.start[3], self.traded))
        return found

    def cluster(self, last: dict) -> dict:
        by_server: dict[str, list] = {n: [] for n in self.names}
        for device in last["devices"]:
            by_server[device["server"]].append(
                {
                    "memory_bytes": device["budget_bytes"] + RESERVED_BYTES,
                    "reserved_bytes": RESERVED_BYTES,
                    "budget_bytes": device["budget_bytes"],
                    "slots": device["budget_bytes"] // EXPERT_BYTES,
                    "resident_bytes": device["resident_bytes"],
                }
            )
        servers = [{"name": n, "devices": d} for n, d in by_server.items()]
        return {"servers": servers, "copies": 1.3, "latency_s": 2e-4, "bandwidth_bytes_per_s": 62.5e6}

    def phases(self) -> list[dict]:
        return [
            {
                "name": name,
                "placement": "dance" if p else "uniform",
                "workload": self.works[p],
                "start_s": self.start[p],
                "end_s": self.start[p + 1],
                "requests": 31 + p,
                "tokens": 1400 + 17 * p,
                "steps": 420,
                "local_ratio": self.ratios[p],
                "local_ratio_mean": _LOCAL[p],
                "network_layers": 0.98 - 0.1 * p,
                "latency_p50_s": 0.82,
                "latency_p95_s": 1.44,
                "network_request_s": 0.114 - 0.03 * (p % 2),
                "network_request_uniform_s": 0.114,
                "remote_share": 1 - _LOCAL[p],
                "remote_share_uniform": 0.66,
                "tokens_per_s": 210.4,
                "bytes_exchanged": 1.2e7,
                "bytes_needed": 9e6,
            }
            for p, name in enumerate(self.phase_names)
        ]

    def moves(self) -> list[dict]:
        return [
            {
                "at_s": self.start[2 * m + 1],
                "phase": 2 * m + 1,
                "from": ("uniform", "dance")[m],
                "to": "dance",
                "copies_added": 120 + m,
                "copies_dropped": 90,
                "bytes_moved": 1.1e7,
                "stage_s": 0.13,
                "seconds": 0.5,
                "commit_s": 0.021,
                "requests_in_flight": 5,
                "remote_share_before": 0.66,
                "remote_share_after": 0.30,
            }
            for m in range(self.migrations)
        ]

    def timeline(self) -> list[dict]:
        def ratio(t: float, name: str) -> float | None:
            mean = self.ratios[int(np.searchsorted(self.start[1:-1], t))][name]
            return None if self.rng.random() < 0.03 else float(np.clip(mean + self.rng.normal(0, 0.035), 0, 1))

        return [{"t_s": float(t), "local_ratio": {n: ratio(t, n) for n in self.names}} for t in self.times]

    def requests(self) -> list[dict]:
        """One each half a second or so, all of which take 0.8 s."""
        return [
            {
                "server": self.names[i % len(self.names)],
                "domain": DOMAINS[i % 3],
                "arrival_s": float(t) - 0.8,
                "finished_s": float(t),
                "tokens": 40,
            }
            for i, t in enumerate(self.times[2::3])
        ]

    def activation(self) -> list[dict]:
        kinds = (
            ("before the first migration", self.works[0], self.taste),
            ("after the workloads traded places", self.works[-1], self.traded),
        )
        return [
            {
                "label": label,
                "workload": work,
                "counts": np.stack([[self.rng.multinomial(9000, r) for r in s] for s in weights]).tolist(),
            }
            for label, work, weights in kinds
        ]

    def samples(self) -> list[dict]:
        text = {
            "prompt": 'def area(radius):\n    """Area of a circle.',
            "output": '"""\n    return radius * radius\n\n\ndef main():\n    print(area(3) < 5 & 6)\n',
        }
        return [
            {"phase": name, "server": n, "domain": self.works[p][n], **text}
            for p, name in enumerate(self.phase_names[:2])
            for n in self.names
        ]


def made_up(servers=3, layers=6, experts=32, *, migrations=2, seconds=80.0, seed=0) -> dict:
    """Figures in the format `dancemoe.demo/1`."""
    demo = _Demo(servers, layers, experts, migrations, seconds, seed)
    placements = demo.placements()
    shares = {"remote_share_first": 0.31, "remote_share_second": 0.33, "reduction_first": 0.53, "reduction_second": 0.5}
    return {
        "format": "dancemoe.demo/1",
        "seed": seed,
        "wall_s": 93.1,
        "peak_memory_bytes": 1.2e9,
        "model": {
            "name": "tiny-moe",
            "layers": layers,
            "experts": experts,
            "top_k": 4,
            "hidden_size": 128,
            "expert_bytes": EXPERT_BYTES,
            "parameters": 5_073_024,
        },
        "cluster": demo.cluster(placements[-1]),
        "load": {"requests_per_s": 4.5, "holds_per_s": 9.0},
        "phases": demo.phases(),
        "migrations": demo.moves(),
        "events": [{"at_s": demo.start[2], "label": "workloads trade places"}] if migrations else [],
        "timeline": demo.timeline(),
        "requests": demo.requests(),
        "activation": demo.activation(),
        "placements": placements,
        "samples": demo.samples(),
        "checks": {
            "requests_checked": 60,
            "tokens_checked": 2900,
            "checked_across_migrations": 9,
            "mismatches": 0,
            "compilations_after_warmup": 0,
            "within_budget": True,
        },
        "headline": {"remote_share_uniform": 0.66} | (shares if migrations else dict.fromkeys(shares)),
    }
