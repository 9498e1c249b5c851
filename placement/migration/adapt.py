"""A placement carried over to another model's sizes, or to a cluster that has changed: other devices, other memory."""

import dataclasses

import numpy as np

from placement.data.cluster import Cluster
from placement.data.placement import Placement
from placement.data.profile import Profile
from placement.files import InputError


def adapt(placement: Placement, cluster: Cluster) -> Placement:
    """The placement as far as the cluster has room for it, with every expert covered; nothing else is planned.

    Devices are the same where server and index are. What a device has no room for is given up, experts with most copies
    first; an expert that is then nowhere goes where room is left, or takes the place of one that has another copy.

    Raises:
        InputError: the cluster has no room for one copy of every expert.
    """
    placement.require_home()
    old = {device: index for index, device in enumerate(placement.devices)}
    size, shape = placement.expert_bytes, placement.resident.shape[1:]
    reserved = placement.model.get("reserved_bytes", 0)
    # Where there is one number for each device, new ones need what the largest does.
    room = cluster.memory - np.max(np.asarray(reserved))
    resident = np.zeros((len(cluster.device_names), *shape), bool)
    for index, device in enumerate(cluster.device_names):
        if device in old:
            resident[index] = placement.resident[old[device]]
    room = room - resident.sum(2) @ size
    copies = resident.sum(0)

    def give_up(device: int) -> bool:
        """Give up the expert of which there are most copies; whether there was one."""
        held = np.argwhere(resident[device])
        if not len(held):
            return False
        layer, expert = held[np.argmax(copies[tuple(held.T)])]
        resident[device, layer, expert] = False
        copies[layer, expert] -= 1
        room[device] += size[layer]
        return True

    for device in range(len(resident)):
        while room[device] < 0 and give_up(device):
            pass
    for layer, expert in np.argwhere(copies == 0):
        device = int(np.argmax(room))
        if room[device] < size[layer]:
            spare = [int((resident[d] & (copies > 1)).sum()) for d in range(len(resident))]
            device = int(np.argmax(spare))
            while room[device] < size[layer] and (resident[device] & (copies > 1)).any():
                give_up(device)
        if room[device] < size[layer]:
            raise InputError(
                f"{cluster.source}: no room for layer {layer} expert {expert} of {placement.source}; add memory or devices"
            )
        resident[device, layer, expert] = True
        copies[layer, expert] += 1
        room[device] -= size[layer]
    resident.setflags(write=False)
    model = {**placement.model, "reserved_bytes": int(np.max(np.asarray(reserved)))}
    return Placement(resident, cluster.device_names, placement.strategy, model, source=placement.source)


def fitted(placed: Placement, profile: Profile, cluster: Cluster) -> Placement:
    """A placement with the sizes of the model that is to run by it, whatever engine it was planned for.

    Raises:
        InputError: it is for another model or other devices, leaves out an expert, needs more memory than there is, or has
            layers hosted elsewhere than at home.
    """
    placed.require_home()
    _, layers, experts = profile.counts.shape
    model = {"name": profile.model, "layers": layers, "experts": experts, "top_k": profile.top_k}
    for key in ("layers", "experts", "top_k"):
        if placed.model[key] != model[key]:
            raise InputError(
                f"{placed.source}: model.{key} = {placed.model[key]}, but {profile.model} has {model[key]}; plan it for this "
                "model"
            )
    sizes = {"expert_bytes": profile.expert_bytes, "reserved_bytes": profile.reserved_bytes}
    placed = dataclasses.replace(placed, model={**model, **sizes})
    placed.validate(cluster)
    return placed
