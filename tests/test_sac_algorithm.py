"""The mathematics of sac_continuous.py against independent truth."""

import math

import numpy as np
import pytest
import torch
from torch import distributions as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import sac_continuous as sac

CPU = torch.device("cpu")


def make_agent(obs_dim=3, action_dim=2, **settings):
    torch.manual_seed(0)
    return sac.Agent(sac.Args(hidden_size=16, **settings), obs_dim, action_dim, CPU)


def make_batch(batch=32, obs_dim=3, action_dim=2):
    g = torch.Generator().manual_seed(1)
    obs, next_obs = torch.randn(2, batch, obs_dim, generator=g)
    action = torch.rand(batch, action_dim, generator=g) * 2 - 1
    reward, terminated = torch.randn(batch, generator=g), (torch.rand(batch, generator=g) < 0.5).float()
    return obs, action, reward, next_obs, terminated


def filled_buffer(obs_dim=3, action_dim=2):
    buffer = sac.ReplayBuffer(100, obs_dim, action_dim, CPU)
    for row in zip(*(x.numpy() for x in make_batch(64, obs_dim, action_dim)), strict=True):
        buffer.add(*row)
    return buffer


class GivenQ(torch.nn.Module):
    """A critic that is a known function of the action."""

    def __init__(self, q):
        super().__init__()
        self.q = q

    def forward(self, obs, action):
        return self.q(action)[None]


def copies(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(module, tensors):
    return all(torch.equal(p, t) for p, t in zip(module.parameters(), tensors, strict=True))


# ----------------------------------------------------------------------------------------------------- the policy


def test_log_prob_matches_torch_distributions():
    actor = sac.Actor(3, 2)
    mean, log_std, noise = torch.randn(3, 1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = mean + log_std.exp() * noise
    normal = dist.Normal(mean, log_std.exp())
    squashed = dist.TransformedDistribution(normal, dist.TanhTransform(cache_size=1))
    action = squashed.transforms[0](u)  # the cache spares the inverse, which loses the tails
    assert torch.allclose(actor.log_prob(u, noise, log_std), squashed.log_prob(action).sum(-1), atol=1e-9)
    actor.squash = False
    assert torch.allclose(actor.log_prob(u, noise, log_std), normal.log_prob(u).sum(-1), atol=1e-9)


def test_log_prob_is_exact_and_has_finite_gradients_far_in_the_tails():
    actor = sac.Actor(3, 1)
    u = torch.tensor([[-80.0], [-20.0], [-9.0], [0.0], [9.0], [20.0], [80.0]], requires_grad=True)
    log_prob = actor.log_prob(u, torch.zeros(7, 1), torch.zeros(7, 1))
    x = u.detach().double().squeeze(1).numpy()
    correction = 2 * (math.log(2) - np.logaddexp(x, -x))  # log(1 - tanh^2) = -2 log cosh
    expected = -0.5 * math.log(2 * math.pi) - correction
    assert np.allclose(log_prob.detach(), expected, rtol=1e-6)
    (gradient,) = torch.autograd.grad(log_prob.sum(), u)
    assert np.allclose(gradient.squeeze(1), 2 * np.tanh(x), atol=1e-5)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (1.5, -1.0), (-0.5, 0.5)])
def test_density_over_the_action_integrates_to_one(mean, log_std):
    actor = sac.Actor(3, 1)
    edges = torch.linspace(-1, 1, 400_001, dtype=torch.float64)
    action = (edges[1:] + edges[:-1]) / 2
    u = torch.atanh(action)[:, None]
    log_std = torch.full_like(u, log_std)
    density = actor.log_prob(u, (u - mean) / log_std.exp(), log_std).exp()
    assert density.mean().item() * 2 == pytest.approx(1, abs=1e-4)


def test_samples_fall_where_their_density_says():
    torch.manual_seed(0)
    actor = sac.Actor(1, 1, hidden_size=4)
    with torch.no_grad():
        action, _ = actor.sample(torch.zeros(200_000, 1), torch.randn(200_000, 1))
        mean, log_std = actor(torch.zeros(1, 1))
        u = torch.atanh((torch.arange(-9999, 10_000, 2) / 10_000)[:, None])  # midpoints of 10,000 cells of [-1, 1]
        density = actor.log_prob(u, (u - mean) / log_std.exp(), log_std.expand_as(u)).exp()
    expected = density.reshape(10, -1).mean(1) * 0.2
    found = torch.histc(action, 10, -1, 1) / len(action)
    assert torch.allclose(found, expected, atol=4e-3)


@pytest.mark.parametrize("actor_std", ["shared", 0.1])
def test_standard_deviation_shared_or_fixed(actor_std):
    actor = sac.Actor(3, 2, actor_std=actor_std)
    _, log_std = actor(torch.randn(5, 3))
    assert torch.allclose(log_std.exp(), torch.full((5, 2), 1.0 if actor_std == "shared" else 0.1))
    learned = [name for name, _ in actor.named_parameters() if name == "log_std"]
    assert learned == (["log_std"] if actor_std == "shared" else [])


def test_log_std_stays_within_its_bounds():
    actor = sac.Actor(3, 2)
    _, log_std = actor(1e4 * torch.randn(100, 3))
    assert log_std.min() == sac.LOG_STD_MIN
    assert log_std.max() == sac.LOG_STD_MAX


# ---------------------------------------------------------------------------------------------------- the critics


def test_ensemble_is_its_members_side_by_side():
    ensemble = sac.Ensemble(3, 5, hidden_size=8, num_layers=2, activation="tanh")
    obs, action = torch.randn(7, 4), torch.randn(7, 1)
    for j in range(3):
        x = torch.cat([obs, action], 1)
        for i, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
            x = torch.nn.functional.linear(torch.tanh(x) if i else x, weight[j].T, bias[j, 0])
        assert torch.allclose(ensemble(obs, action)[j], x[:, 0], atol=1e-6)


def test_critic_target_by_hand():
    # ordinary, terminated, truncated (a truncated transition is stored as not terminated)
    reward, terminated, next_value = torch.tensor([[1.0, 1.0, 2.0], [0, 1, 0], [10, 10, 20]])
    assert sac.critic_target(reward, terminated, next_value, 0.9).tolist() == pytest.approx([10, 1, 20])


def test_backups_by_hand():
    q = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    assert sac.backup(q, "min").tolist() == [[1, 2]]
    assert sac.backup(q, "mean").tolist() == [[2, 3.5]]
    assert sac.backup(q, "double-q").tolist() == [[3, 2], [1, 5]]
    assert sac.backup(q, "redq").tolist() == [[1, 2]]
    single = torch.tensor([[1.0, 5.0]])
    assert sac.backup(single, "mean").tolist() == sac.backup(single, "min").tolist() == [[1, 5]]


def test_actor_maximises_min_or_mean_by_hand():
    q = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    for kind in ("min", "value"):
        assert sac.actor_objective(q, kind).tolist() == [1, 2]
    for kind in ("mean", "double-q", "redq"):
        assert sac.actor_objective(q, kind).tolist() == [2, 3.5]


def test_losses_by_hand():
    q, target = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0]])
    assert sac.critic_loss(q, target).item() == pytest.approx((1 + 4) / 4 + (9 + 16) / 4)
    log_prob, q = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    assert sac.soft_value(q, log_prob, 0.5).tolist() == [2.5, 4]
    assert sac.actor_loss(log_prob, q, 0.5).item() == pytest.approx(-3.25)


def whole_target(agent, batch, temperature):
    """The critics' target of an update, computed apart: what the loss equals and the noise it drew."""
    _, action, reward, next_obs, terminated = batch
    kind = agent.args.critic_backup
    noise = torch.randn(action.shape, generator=agent.streams["update"])
    with torch.no_grad():
        mean, log_std = agent.actor(next_obs)
        normal = dist.Normal(mean, log_std.exp())
        squashed = dist.TransformedDistribution(normal, dist.TanhTransform(cache_size=1))
        next_action = squashed.transforms[0](mean + log_std.exp() * noise)
        log_prob = squashed.log_prob(next_action).sum(-1)
        q = agent.target(next_obs, next_action)
        if kind == "redq":
            pair = torch.rand(len(q), generator=agent.streams["update"]).topk(2).indices
            q = q[pair]
        rows = {"min": q.amin(0), "redq": q.amin(0), "mean": q.mean(0), "double-q": torch.stack([q[-1], q[0]])}[kind]
        return reward + agent.args.gamma * (1 - terminated) * (rows - temperature * log_prob)


@pytest.mark.parametrize(
    ("settings", "entropy_weight"),
    [
        ({"temperature": 0.3}, 0.3),
        ({"temperature": 0.3, "backup_entropy": False}, 0.0),
        ({"temperature": 0.0}, 0.0),
        ({"temperature": 0.3, "num_critics": 1, "critic_backup": "mean"}, 0.3),
        ({"temperature": 0.3, "num_critics": 5, "critic_backup": "mean"}, 0.3),
        ({"temperature": 0.3, "critic_backup": "double-q"}, 0.3),
        ({"temperature": 0.3, "num_critics": 5, "critic_backup": "redq"}, 0.3),
    ],
)
def test_a_critic_update_regresses_on_the_target_of_its_variant(settings, entropy_weight):
    agent, batch = make_agent(**settings), make_batch()
    for p in agent.target.parameters():
        p.mul_(1.5)  # so that the target network is not the online one
    stream = agent.streams["update"].get_state()
    target = whole_target(agent, batch, entropy_weight)
    q = agent.critic(batch[0], batch[1]).detach()
    agent.streams["update"].set_state(stream)
    metrics = agent.update_critics(*batch)
    expected = 0.5 * sum(torch.mean((q[j] - target.expand_as(q)[j]) ** 2) for j in range(len(q)))
    assert metrics["critic_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_redq_draws_every_pair_of_critics():
    agent = make_agent(num_critics=4, critic_backup="redq")
    pairs = {tuple(sorted(agent.random(torch.rand, 4).topk(2).indices.tolist())) for _ in range(300)}
    assert len(pairs) == 6


def test_value_network_finds_its_fixed_point():
    """One state, reward 1, no termination, no entropy: V = r / (1 - gamma) = 2 at gamma = 0.5."""
    settings = {"critic_backup": "value", "temperature": 0.0, "gamma": 0.5, "tau": 0.05, "critic_lr": 3e-3}
    agent = make_agent(1, 1, **settings)
    obs, reward, terminated = torch.ones(64, 1), torch.ones(64), torch.zeros(64)
    for _ in range(600):
        agent.update_critics(obs, torch.rand(64, 1) * 2 - 1, reward, obs, terminated)
    assert agent.value(obs).mean().item() == pytest.approx(2, abs=0.05)
    assert agent.target(obs).mean().item() == pytest.approx(2, abs=0.05)


def test_value_network_includes_the_entropy_of_the_policy():
    """gamma = 0 and reward 0: Q = 0, so V = temperature * entropy of the policy."""
    agent = make_agent(1, 1, critic_backup="value", temperature=0.5, gamma=0.0, critic_lr=3e-3)
    obs, zeros = torch.ones(256, 1), torch.zeros(256)
    for _ in range(600):
        agent.update_critics(obs, torch.rand(256, 1) * 2 - 1, zeros, obs, zeros)
    with torch.no_grad():
        _, log_prob = agent.actor.sample(torch.ones(100_000, 1), torch.randn(100_000, 1))
    assert agent.value(obs[:1]).item() == pytest.approx(-0.5 * log_prob.mean().item(), abs=0.03)


# ---------------------------------------------------------------------------------------------------- the targets


def test_soft_targets_are_polyak_averages():
    agent = make_agent(tau=0.1)
    old, online = copies(agent.target), agent.online
    for p in online.parameters():
        p.data.add_(1)
    sac.move_target(agent.target, online, 0.1)
    expected = [0.9 * t + 0.1 * p for t, p in zip(old, copies(online), strict=True)]
    assert all(torch.allclose(p, e) for p, e in zip(agent.target.parameters(), expected, strict=True))


def test_hard_targets_copy_exactly_at_the_period_and_not_between():
    agent, batch = make_agent(tau=1.0, target_update_period=3), make_batch()
    before = copies(agent.target)
    for update in range(1, 7):
        agent.update_critics(*batch)
        if update % 3 == 0:
            assert equal(agent.target, copies(agent.critic))
            before = copies(agent.target)
        else:
            assert equal(agent.target, before)
            assert not equal(agent.critic, before)


def test_targets_move_after_each_of_several_critic_updates():
    agent = make_agent(num_critic_updates=4)
    actor = copies(agent.actor)
    agent.update(filled_buffer(), 0.0)
    assert agent.num_critic_updates == 4
    assert agent.optimizers["critic"].state_dict()["state"][0]["step"] == 4
    assert agent.optimizers["actor"].state_dict()["state"][0]["step"] == 1
    assert not equal(agent.actor, actor)


# ------------------------------------------------------------------------------------------------------ the actor


def test_actor_update_leaves_the_critics_alone():
    for estimator in ("reparametrize", "reinforce"):
        agent = make_agent(actor_gradient=estimator)
        critic, actor = copies(agent.critic), copies(agent.actor)
        agent.update_actor(make_batch()[0])
        assert equal(agent.critic, critic)
        assert all(p.grad is None for p in agent.critic.parameters())
        assert not equal(agent.actor, actor)


def test_a_gradient_may_lie_in_memory_in_another_order():
    agents = make_agent(), make_agent()
    (gradients, metrics), obs = agents[0].actor_gradients(make_batch()[0], torch.randn(32, 2)), make_batch()[0]
    turned = [g.mT.contiguous().mT if g.ndim > 1 else g for g in gradients]
    assert not all(g.is_contiguous() for g in turned)
    for agent, given in zip(agents, (gradients, turned), strict=True):
        agent.gradients_of["actor"] = lambda obs, noise, given=given: (given, metrics)
        agent.update_actor(obs)
    assert equal(agents[0].actor, copies(agents[1].actor))


def gradients_on_a_quadratic(estimator, samples, repeats, seed=0):
    """Gradients in (mean, log_std) of E[temperature log pi - Q] for Q = -(a - 1)^2, an unsquashed Gaussian."""
    torch.manual_seed(seed)
    agent = make_agent(1, 1, temperature=0.1, squash=False, actor_std="shared", actor_gradient=estimator)
    agent.args.num_actor_samples = samples
    agent.critic = GivenQ(lambda action: -((action - 1) ** 2).squeeze(-1))
    agent.actor.log_std.data.fill_(math.log(0.5))
    last = agent.actor.net[-1]
    last.weight.data.zero_()
    last.bias.data.fill_(0.2)
    agent.parameters_of["actor"] = [last.bias, agent.actor.log_std]
    noise = (torch.randn(samples * 16, 1) for _ in range(repeats))
    return np.array([[g.item() for g in agent.actor_gradients(torch.zeros(16, 1), n)[0]] for n in noise])


def test_both_estimators_equal_the_closed_form_in_expectation():
    # E[Q] = -(m - 1)^2 - s^2 and E[log pi] = -log s + const, so in (m, log s):
    expected = np.array([2 * (0.2 - 1), 2 * 0.5**2 - 0.1])
    for estimator in ("reparametrize", "reinforce"):
        found = gradients_on_a_quadratic(estimator, samples=4, repeats=1500)
        error = found.std(0) / math.sqrt(len(found))
        assert np.all(np.abs(found.mean(0) - expected) < 4.5 * error + 1e-6), estimator
        assert np.all(error < 0.02)


def test_reinforce_variance_falls_as_one_over_the_samples():
    variance = {n: gradients_on_a_quadratic("reinforce", n, 1500).var(0) for n in (1, 10)}
    assert np.allclose(variance[1] / variance[10], 10, rtol=0.25)
    assert np.all(gradients_on_a_quadratic("reparametrize", 1, 300).var(0) < variance[1])


def test_one_state_problem_reaches_the_soft_optimal_policy():
    """The optimum is p(a) ~ exp(Q(a) / temperature). With Q = temperature log of a squashed Gaussian it is that one."""
    temperature, mean, std = 0.3, torch.tensor([0.6, -0.3]), torch.tensor([0.4, 0.7])
    best = sac.Actor(1, 2)
    for estimator, rate, steps in (("reparametrize", 1e-2, 800), ("reinforce", 5e-3, 3000)):
        agent = make_agent(1, 2, temperature=temperature, actor_lr=rate, actor_gradient=estimator, num_actor_samples=4)

        def q(action):
            u = torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6))
            log_std = std.log().expand_as(u)
            return temperature * best.log_prob(u, (u - mean) / std, log_std)

        agent.critic = GivenQ(q)
        for step in range(steps):
            agent.optimizers["actor"].param_groups[0]["lr"] = rate * (1 - step / steps)
            agent.update_actor(torch.ones(128, 1))
        found_mean, found_log_std = agent.actor(torch.ones(1, 1))
        assert torch.allclose(found_mean[0], mean, atol=0.05), estimator
        assert torch.allclose(found_log_std.exp()[0], std, atol=0.05), estimator


# ------------------------------------------------------------------------------------------------ the temperature


@pytest.mark.parametrize(("target_entropy", "rises"), [(50.0, True), (-50.0, False)])
def test_temperature_moves_towards_its_target_entropy(target_entropy, rises):
    agent = make_agent(target_entropy=target_entropy)
    before = agent.log_temperature.item()
    metrics = agent.update_actor(make_batch()[0])
    assert -50 < metrics["entropy"].mean().item() < 50
    assert (agent.log_temperature.item() > before) == rises


def test_temperature_loss_gradient_by_hand():
    log_temperature = torch.tensor(0.5, requires_grad=True)
    loss = sac.temperature_loss(log_temperature, torch.tensor([1.0, 3.0]), -1.5)
    (gradient,) = torch.autograd.grad(loss, log_temperature)
    assert loss.item() == gradient.item() == pytest.approx(-math.exp(0.5) * 0.5)


def test_fixed_temperature_stays_and_zero_means_no_bonus():
    for temperature in (0.2, 0.0):
        agent = make_agent(temperature=temperature)
        for _ in range(3):
            metrics = agent.update(filled_buffer(), 0.0)
        assert float(metrics["temperature"]) == pytest.approx(temperature)
        assert {group["name"] for group in agent.parameter_groups()} == {"actor", "critic"}


def test_default_target_entropy_is_minus_the_action_dimension():
    assert make_agent(action_dim=2).target_entropy == -2
    assert make_agent(target_entropy=0.5).target_entropy == 0.5


def test_linear_schedule_takes_every_rate_to_zero():
    agent = make_agent(lr_schedule="linear", critic_lr=1e-3, critic_backup="value")
    for progress in (0.0, 0.25, 1.0):
        before = copies(agent)
        agent.update(filled_buffer(), progress)
        rates = {group["name"]: group["lr"].item() for group in agent.parameter_groups()}
        share = 1 - progress
        assert rates == pytest.approx(
            {"actor": 3e-4 * share, "critic": 1e-3 * share, "value": 1e-3 * share, "temperature": 3e-4 * share}
        )
        if progress == 1:
            trained = [agent.actor, agent.critic, agent.value]
            assert all(torch.equal(p, b) for p, b in zip(agent.parameters(), before, strict=True) if p.requires_grad)
            assert trained


# ---------------------------------------------------------------------------------------------------- the buffer


def sample(buffer, batch_size, seed):
    index = torch.empty(batch_size, dtype=torch.int64)
    buffer.draw(index, torch.Generator().manual_seed(seed))
    return buffer[index]


def test_buffer_holds_the_last_transitions_across_its_wrap_and_samples_them_uniformly():
    buffer = sac.ReplayBuffer(10, 2, 1, CPU)
    for i in range(27):
        buffer.add([i, -i], [i / 100], 2.0 * i, [i + 1, -i - 1], i % 2 == 0)
    assert len(buffer) == 10
    obs, action, reward, next_obs, terminated = sample(buffer, 20_000, seed=0)
    i = obs[:, 0]
    assert torch.equal(obs[:, 1], -i)
    assert torch.allclose(action[:, 0], i / 100)
    assert torch.equal(reward, 2 * i)
    assert torch.equal(next_obs, torch.stack([i + 1, -i - 1], 1))
    assert torch.equal(terminated, (i % 2 == 0).float())
    counts = torch.bincount(i.long(), minlength=27)[17:]
    assert counts.sum() == 20_000
    chi_square = ((counts - 2000.0) ** 2 / 2000).sum().item()
    assert chi_square < 27.9  # 0.1 % of the chi-square distribution with 9 degrees of freedom


def test_buffer_before_it_is_full_samples_only_what_it_holds():
    buffer = sac.ReplayBuffer(1000, 1, 1, CPU)
    for i in range(3):
        buffer.add([i + 1], [0], 0.0, [0], False)
    assert set(sample(buffer, 100, seed=0)[0].flatten().tolist()) == {1, 2, 3}


# -------------------------------------------------------------------------------------------------- captured updates


class Tape(TorchDispatchMode):
    """What a CUDA graph does, without a GPU: the operations of one call, done again on the same tensors."""

    def __init__(self, function, generator, stream):
        super().__init__()
        self.function, self.calls, self.operations = function, 0, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        detached = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, result))
        if operation.namespace != "profiler":  # the optimisers' marks
            self.operations.append((operation, *detached))
        return result

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, result in self.operations:
            assert operation is not torch.ops.aten._local_scalar_dense.default  # a number read back would be frozen
            again = tree_leaves(operation(*args, **kwargs))
            for old, new in zip(tree_leaves(result), again, strict=True):
                if not operation._schema.is_mutable and old.data_ptr() != new.data_ptr():  # neither in place nor a view
                    old.copy_(new)

    def __call__(self):
        self.calls += 1
        if self.calls <= 3:
            return self.function()
        if not self.operations:
            with self:
                self.result = self.function()
        else:
            self.replay()
        return self.result


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr_schedule": "linear", "num_actor_samples": 2},
        {"critic_backup": "redq", "num_critics": 4, "num_critic_updates": 3, "target_update_period": 4},
        {"critic_backup": "value", "temperature": 0.2, "target_update_period": 5, "tau": 1.0},
        {"actor_gradient": "reinforce", "critic_backup": "double-q", "actor_std": "shared"},
    ],
)
def test_an_update_done_again_on_the_same_tensors_is_the_next_update(settings, monkeypatch):
    """Nothing that changes from update to update is a Python number that a capture would freeze."""
    monkeypatch.setattr(sac, "CudaGraph", Tape)
    plain, captured = make_agent(**settings), make_agent(**settings)
    captured.graphs = {}
    buffer = filled_buffer()
    for i in range(20):
        buffer.add([i, 1, 2], [0.5, -0.5], 1.0, [i, 2, 1], False)
        metrics = plain.update(buffer, i / 20), captured.update(buffer, i / 20)
        for name, value in metrics[0].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(metrics[1][name])), name
        norms = plain.gradient_norms(), captured.gradient_norms()
        assert norms[0] == norms[1]
    assert any(graph.operations for graph in captured.graphs.values())
    assert equal(captured, copies(plain))
    assert captured.num_critic_updates == plain.num_critic_updates


def test_default_matrix_products_are_float32():
    sac.set_up_torch(sac.Args(device="cpu"))
    x, y = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ y.double()
    assert ((x @ y) - exact).abs().max() / exact.abs().max() < 2e-6  # bfloat16 has 3e-3
