"""The end of a step: logits of the tokens that they are wanted of, and the likeliest next ones."""

from dancemoe_jax.kernels.argmax import likeliest_native, likeliest_xla
from dancemoe_jax.model.decoder import head_logits
from dancemoe_jax.model.present import where_present


def next_tokens(step, decoder, x, rows, present, all_logits):
    """Logits of each row's last token or of all tokens, those of the last ones, and the likeliest next token of each row."""
    config, native, active = step.config, step.native, rows.lengths > 0
    if all_logits:
        logits = head_logits(config, decoder, x, native, rows.valid.reshape(-1))
        final = rows.of_last(logits)
    else:
        of_last = rows.of_last(x)
        final = logits = where_present(present, lambda x: head_logits(config, decoder, x, native, active), of_last)
    return logits, final, (likeliest_native if native else likeliest_xla)(final, active)
