import torch
from torch import Tensor
from .modeling_raptor import RaptorBlock, StepModulation


class Probe:
    """Runs blocks and keeps what their two output projections read, and the tokens between the branches."""

    def __init__(self, block):
        self.block, self.kept = block, {}
        self.handles = [
            block.attention.proj.register_forward_pre_hook(lambda m, a: self.kept.__setitem__("proj", a[0])),
            block.ffn.fc2.register_forward_pre_hook(lambda m, a: self.kept.__setitem__("fc2", a[0])),
            block.norm2.register_forward_pre_hook(lambda m, a: self.kept.__setitem__("middle", a[0])),
        ]

    def close(self):
        for h in self.handles: h.remove()


class Normal:
    """Sums of one step's normal equations, float64: of features with a one appended, and of targets."""

    def __init__(self, n_in, n_out):
        self.G = torch.zeros(n_in + 1, n_in + 1, dtype=torch.float64)
        self.C = torch.zeros(n_in + 1, n_out, dtype=torch.float64)
        self.yy = torch.zeros(n_out, dtype=torch.float64)

    def add(self, F, Y, token_weight=None):
        F = F.flatten(0, -2).float(); Y = Y.flatten(0, -2).float()
        F = torch.cat([F, F.new_ones(len(F), 1)], 1)
        FW = F if token_weight is None else F * token_weight
        self.G += (FW.T @ F).double(); self.C += (FW.T @ Y).double()

    def affine_split(self):
        n = self.G[-1, -1]; m, y = self.G[-1, :-1] / n, self.C[-1] / n
        return self.G[:-1, :-1] - n * torch.outer(m, m), self.C[:-1] - n * torch.outer(m, y), m, y


def solve(steps, weights, lam, shifts, scales, prior=None):
    """W (out, in), b (out): sum_l w_l |s_l (W f + b) + o_l - y_l|^2 with free o_l if shifts."""
    G = C = 0
    for st, w, s in zip(steps, weights, scales):
        if shifts: g, c, _, _ = st.affine_split()
        else: g, c = st.G, st.C
        G = G + w * s * s * g; C = C + w * s * c
    d = G.diagonal().mean() * lam
    reg = torch.eye(len(G), dtype=G.dtype) * d
    if not shifts: reg[-1, -1] = 0
    if prior is not None: C[: len(prior)] += d * prior
    W = torch.linalg.solve(G + reg, C)
    return (W, None) if shifts else (W[:-1], W[-1])


def low_rank(st, R, rank, lam):
    """Reduced-rank regression of what is left, R = C - G W: factors (out, r), (r, in)."""
    g, c, _, _ = st.affine_split(); g = g + torch.eye(len(g), dtype=g.dtype) * (g.diagonal().mean() * lam)
    D = torch.linalg.solve(g, R)
    Lc = torch.linalg.cholesky(g)
    U, S, V = torch.linalg.svd(Lc.T @ D, full_matrices=False)
    V = V[:rank]
    down = (D @ V.T).T          # (r, in)
    a = (down.square().mean().sqrt() / V.square().mean().sqrt()).sqrt()
    return (V.T * a), down / a


@torch.no_grad()
def fit_blocks(teacher, student, batches, rounds=4, ridge=1e-2, gains=True, scaled=True, damp=1.0, cls=0.0, to_prior=True, verbose=False, memory=0.5, autocast=True):
    base = student.base_model; enc = base.encoder; config = base.config
    modes = student.training; student.eval()
    L = config.num_hidden_layers; var = 0; n = 0
    traj = []
    ctx = lambda: torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with ctx():
        for x in batches: traj.append(teacher.trajectory(x).float().transpose(0, 1))
    allm = torch.stack([t.mean((1, 2)) for t in traj]).mean(0); allsq = torch.stack([t.square().mean((1, 2)) for t in traj]).mean(0)
    var = (allsq - allm.square()).mean(1)
    # teacher's tokens between the branches
    mids = [[None] * (L + 1) for _ in traj]
    tb = RaptorBlock(config).eval(); probe = Probe(tb)
    for l in range(1, L + 1):
        tb.load_state_dict(teacher.block_state_dict(l))
        for i, t in enumerate(traj):
            with ctx(): tb(t[l - 1])
            mids[i][l] = probe.kept["middle"].float()
    probe.close()
    T = traj[0].shape[2]
    x0 = [t[0] for t in traj]
    cond = enc.conditioners; has = lambda b, n: hasattr(cond[b], n)
    for b, layers in enumerate(config.block_layers):
        block = enc.blocks[b]; c = cond[b]; plan = tuple((b, float(l)) for l in layers); shifts = has(b, "attention_shift"); gainy = gains and has(b, "layer_scale1_gain")
        prior = {'proj': (block.attention.proj.weight * block.layer_scale1.lambda1[:, None]).double().T, 'fc2': (block.ffn.fc2.weight * block.layer_scale2.lambda1[:, None]).double().T} if to_prior else {}
        block.layer_scale1.lambda1.fill_(1.0); block.layer_scale2.lambda1.fill_(1.0)
        weights = [1.0 / float(var[l]) for l in layers]
        sums = {}
        for r in range(rounds + 1):
            for kind in ("proj", "fc2"):
                probe = Probe(block); lin = block.attention.proj if kind == "proj" else block.ffn.fc2
                steps = sums.setdefault(kind, [Normal(lin.in_features, lin.out_features) for _ in layers])
                for st in steps: st.G *= memory; st.C *= memory
                ysq = [0.0] * len(layers)
                mods = enc.modulations(plan)
                for i, t in enumerate(traj):
                    x = x0[i]
                    for k, l in enumerate(layers):
                        if r == 0: x = t[l - 1]
                        with ctx():
                            if r == 0 and kind == "fc2":
                                # the teacher's own tokens between the branches
                                z = mids[i][l]; block.ffn(block.norm2(z, mods[k].norm2_gain, mods[k].norm2_shift)); out = x
                            else:
                                out, _ = block(x, *mods[k])
                        F = probe.kept[kind]
                        if kind == "proj": Y = mids[i][l] - x
                        else: Y = t[l] - (mids[i][l] if r == 0 else probe.kept["middle"].float())
                        tw = None
                        if cls:
                            tw = torch.full((F.shape[0], T, 1), (1 - cls) * T / (T - 1)); tw[:, 0] = cls * T; tw = tw.flatten(0, 1)
                        steps[k].add(F, Y, tw); ysq[k] += float(((Y - Y.mean((0, 1))) ** 2).sum())
                        x = out.float()
                probe.close()
                scales = [1.0] * len(layers)
                if scaled and gainy:
                    ref = (sum(ysq) / len(ysq)) ** .5; scales = [max(y, 1e-12) ** .5 / ref for y in ysq]
                W, bias = solve(steps, weights, ridge, shifts, scales, prior.get(kind)); 
                if verbose and r in (0, rounds): r_ = lambda w: round(float(w.square().mean().sqrt()), 4); print(b, r, kind, 'rms', r_(W), 'prior', r_(prior[kind]) if prior else None, 'scales', [round(v, 2) for v in scales])
                lin.weight.copy_(W.T); bias = torch.zeros(lin.out_features, dtype=torch.float64) if bias is None else bias; lin.bias.copy_(bias)
                gname = "layer_scale1_gain" if kind == "proj" else "layer_scale2_gain"; sname = "attention_shift" if kind == "proj" else "ffn_shift"
                if gainy:
                    for k, st in enumerate(steps):
                        g, cc, m, y = st.affine_split()
                        num = (W * cc).sum(0); den = (W * (g @ W)).sum(0)
                        gain = num / den.clamp(min=1e-12)
                        if not shifts: gain = gain * 0 + scales[k]
                        getattr(c, gname)[k].copy_(gain - 1)
                        if config.output_rank:
                            Wk = W * gain; up, down = low_rank(st, cc - g @ Wk, config.output_rank, ridge)
                            up = up / gain[:, None].clamp(min=.05)
                            getattr(c, kind + "_up")[k].copy_(up); getattr(c, kind + "_down")[k].copy_(down)
                        if shifts:
                            Wt = lin.weight.double().T + ((getattr(c, kind + "_up")[k].double() @ getattr(c, kind + "_down")[k].double()).T if config.output_rank else 0)
                            getattr(c, sname)[k].copy_(y - (m @ Wt + bias) * gain)
        mods = enc.modulations(plan)
        for i in range(len(x0)):
            x = x0[i]
            for k in range(len(layers)):
                with ctx(): x = block(x, *mods[k])[0].float()
            x0[i] = x
    student.train(modes)
