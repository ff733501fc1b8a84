"""Equations of the schemes of other looped models, written out, for the trainer's model and for the exported one.

Each takes the scheme's module (for its parameters), h_emb, the blocks (prelude, then the core of every loop) as
functions of a state, and the settings; it returns the state that enters the coda.
"""

import torch


def adapter(recurrence, h_emb, blocks, config):
    h = blocks[0](h_emb)
    for core in blocks[1:]:
        h = torch.cat([core(h), h_emb], -1) @ recurrence.adapter.weight.T + recurrence.adapter.bias
    return h


def decay(recurrence, h_emb, blocks, config):
    a, b = recurrence.decay.logit, recurrence.injection.weight
    b = b if config.decay_input == "linear" else torch.diag(b)
    h0 = h = blocks[0](h_emb)
    for core in blocks[1:]:
        h = core(h) / (1 + torch.exp(-a)) + h0 @ b.T
    return h


def hyper(recurrence, h_emb, blocks, config):
    """One matrix product per reading and writing: lanes [..., n, D]."""
    n = config.hyper_lanes

    def numbers(part, lanes):
        static = part.bias.reshape(n, -1)
        if not hasattr(part, "weight"):
            return static
        rms = (lanes.pow(2).mean(-1, keepdim=True) + config.norm_epsilon).sqrt()
        return static + 0.01 * (lanes / rms) @ part.weight.T

    def read(r, lanes):
        return (r[..., None] * lanes).sum(-2)

    lanes = torch.stack([blocks[0](h_emb)] * n, -2)
    for loop, core in enumerate(blocks[1:]):
        row = numbers(recurrence.lanes[loop], lanes)  # [n, n + 2] or [..., n, n + 2]: r_j, w_j, M_1j..M_nj
        y = core(read(row[..., 0], lanes))
        lanes = row[..., 2:].transpose(-1, -2) @ lanes + row[..., 1, None] * y[..., None, :]
    return read(numbers(recurrence.output, lanes)[..., 0], lanes)


def attend(recurrence, h_emb, blocks, config):
    history, s = [h_emb], h_emb
    for query, block in zip(recurrence.queries, blocks, strict=True):
        history.append(block(s))
        v = torch.stack(history)
        keys = v / (v.pow(2).mean(-1, keepdim=True) + config.norm_epsilon).sqrt()
        shares = ((keys * query.weight).sum(-1) + query.bias.reshape(-1, 1, 1)).softmax(0)
        s = (shares[..., None] * v).sum(0)
    return s


LOOP_SCHEMES = {"adapter": adapter, "decay": decay, "hyper": hyper, "hyper-dynamic": hyper, "attend": attend}
