"""All figures of a run of the demo as one JSON object, in the format `dancemoe.demo/1`. Measures nothing."""

from typing import Any

from launch.demo.figures import Figures


def demo_result(figures: Figures, checks: dict[str, Any]) -> dict[str, Any]:
    """Everything, in the format `dancemoe.demo/1`."""
    config, phases = figures.config, figures.parts["phases"]
    total = config.num_moe_layers * config.num_experts
    final, devices = figures.parts["placements"][-1]["devices"], iter(range(len(figures.capacity)))
    servers = [
        {
            "name": server.name,
            "devices": [
                {
                    "memory_bytes": device.memory,
                    "reserved_bytes": figures.reserved,
                    "budget_bytes": device.memory - figures.reserved,
                    "slots": figures.capacity[i],
                    "resident_bytes": final[i]["resident_bytes"],
                }
                for device, i in zip(server.devices, devices, strict=False)
            ],
        }
        for server in figures.cluster.servers
    ]
    headline = {"remote_share_uniform": phases[0]["remote_share"]}
    for name, phase in (("first", phases[1]), ("second", phases[3])):
        headline[f"remote_share_{name}"] = phase["remote_share"]
        headline[f"reduction_{name}"] = 1 - phase["remote_share"] / max(phase["remote_share_uniform"], 1e-12)
    checks |= {"compilations_after_warmup": figures.compilations, "within_budget": figures.within_budget}
    return {
        "format": "dancemoe.demo/1",
        "seed": figures.seed,
        "model": {
            "name": figures.model_name,
            "layers": config.num_moe_layers,
            "experts": config.num_experts,
            "top_k": config.top_k,
            "hidden_size": config.hidden_size,
            "expert_bytes": figures.expert_bytes,
            "parameters": config.other_params + total * config.expert_params,
        },
        "cluster": {"servers": servers, "copies": sum(figures.capacity) / total, **figures.slowest_link},
        "load": {"requests_per_s": figures.rate * len(servers), "holds_per_s": figures.holds},
        **figures.parts,
        "checks": checks,
        "headline": headline,
    }
