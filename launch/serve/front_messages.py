"""What a front door and its worker say to each other: fields of their messages (`launch.cluster.framing`). Loads no JAX."""

PURPOSE = "front door"
LONGEST = 2**27  # bytes of a message

ROLE = {
    "role": str
}  # the first message of a connection: "requests" go to the worker by it, or "tokens" come from there
TO_WORKER = {"submit?": list, "cancel?": list, "last?": bool, "ask?": dict, "door?": str}
"""submit: requests, each an object with `id` and SUBMITTED; cancel: ids; last: there is nothing more to come;
door: where other front doors find this one."""
SUBMITTED = ("prompt", "output", "max_tokens", "params", "stop_token_ids", "logprobs", "schema", "servers", "label")
TO_FRONT = {
    "phase?": list,
    "servers?": list,
    "begun?": list,
    "tokens?": list,
    "detailed?": list,
    "ended?": list,
    "beat?": dict,
    "failed?": dict,
    "problem?": str,
    "draining?": bool,
    "reply?": list,
}
"""begun: ids of requests that have a batch slot; tokens: [id, its next tokens ...]; detailed: [id, token, logprobs], then
calls by server, where they are wanted; ended: [id, reason, error]; failed: ids and why, of a step that failed; problem: why
the worker ends."""
