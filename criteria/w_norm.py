"""Penalty on latents far from the average (published W-norm loss)."""


def latent_norm(average=None):
    """A function ws [N, L, D] -> Frobenius norm of ws - average, [N]; average [L, D] or None."""

    def penalty(ws):
        return (ws if average is None else ws - average).flatten(1).norm(dim=1)

    return penalty
