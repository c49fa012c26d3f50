"""The mathematics of sac_continuous.py against independent truth."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import distributions as dist

import sac_continuous as sac


def make_agent(obs_dim=3, action_dim=2, **settings):
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "device": "cpu", "compile": "never", "learning_starts": 0} | settings
    return sac.Agent(sac.Args(**settings), obs_dim, action_dim)


def make_actor(obs_dim=3, action_dim=2, **settings):
    torch.manual_seed(0)
    return sac.Actor(obs_dim, action_dim, sac.Args(hidden_size=16, **settings))


def make_batch(batch=32, obs_dim=3, action_dim=2):
    g = torch.Generator().manual_seed(1)
    obs, next_obs = torch.randn(2, batch, obs_dim, generator=g)
    action = torch.rand(batch, action_dim, generator=g) * 2 - 1
    reward, terminated = torch.randn(batch, generator=g), (torch.rand(batch, generator=g) < 0.5).float()
    return obs, action, reward, next_obs, terminated


def filled_buffer(obs_dim=3, action_dim=2):
    buffer = sac.ReplayBuffer(100, obs_dim, action_dim, torch.device("cpu"))
    for row in zip(*(x.numpy() for x in make_batch(64, obs_dim, action_dim)), strict=True):
        buffer.add(*row)
    return buffer


def copies(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(module, tensors):
    return all(torch.equal(p, t) for p, t in zip(module.parameters(), tensors, strict=True))


def spy(monkeypatch, agent, name):
    """The arguments and results of the agent's calls of that method, as they are made."""
    original, calls = getattr(agent, name), []

    def spying(*arguments):
        calls.append((arguments, original(*arguments)))
        return calls[-1][1]

    monkeypatch.setattr(agent, name, spying)
    return calls


class GivenQ(torch.nn.Module):
    """A critic that is a known function of the action."""

    def __init__(self, q):
        super().__init__()
        self.q = q

    def forward(self, obs, action):
        return self.q(action)[None]


# ----------------------------------------------------------------------------------------------------- the policy


def test_log_prob_matches_torch_distributions():
    actor = make_actor()
    mean, log_std, noise = torch.randn(3, 1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = mean + log_std.exp() * noise
    normal = dist.Normal(mean, log_std.exp())
    squashed = dist.TransformedDistribution(normal, dist.TanhTransform(cache_size=1))
    action = squashed.transforms[0](u)  # the cache spares the inverse, which loses the tails
    assert torch.allclose(actor.log_prob(u, noise, log_std), squashed.log_prob(action).sum(-1), atol=1e-9)
    actor.squash = False
    assert torch.allclose(actor.log_prob(u, noise, log_std), normal.log_prob(u).sum(-1), atol=1e-9)


def test_log_prob_is_exact_and_has_finite_gradients_far_in_the_tails():
    u = torch.tensor([[-80.0], [-20.0], [-9.0], [0.0], [9.0], [20.0], [80.0]], requires_grad=True)
    log_prob = make_actor(3, 1).log_prob(u, torch.zeros(7, 1), torch.zeros(7, 1))
    x = u.detach().double().squeeze(1).numpy()
    correction = 2 * (math.log(2) - np.logaddexp(x, -x))  # log(1 - tanh^2) = -2 log cosh
    expected = -0.5 * math.log(2 * math.pi) - correction
    assert np.allclose(log_prob.detach(), expected, rtol=1e-6)
    (gradient,) = torch.autograd.grad(log_prob.sum(), u)
    assert np.allclose(gradient.squeeze(1), 2 * np.tanh(x), atol=1e-5)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (1.5, -1.0), (-0.5, 0.5)])
def test_density_over_the_action_integrates_to_one(mean, log_std):
    edges = torch.linspace(-1, 1, 400_001, dtype=torch.float64)
    action = (edges[1:] + edges[:-1]) / 2
    u = torch.atanh(action)[:, None]
    log_std = torch.full_like(u, log_std)
    density = make_actor(3, 1).log_prob(u, (u - mean) / log_std.exp(), log_std).exp()
    assert density.mean().item() * 2 == pytest.approx(1, abs=1e-4)


def test_samples_fall_where_their_density_says():
    actor = make_actor(1, 1)
    with torch.no_grad():
        mean, log_std = actor(torch.zeros(1, 1))
        action, _ = actor.sample(mean, log_std, torch.randn(200_000, 1))
        u = torch.atanh((torch.arange(-9999, 10_000, 2) / 10_000)[:, None])  # midpoints of 10,000 cells of [-1, 1]
        density = actor.log_prob(u, (u - mean) / log_std.exp(), log_std.expand_as(u)).exp()
    expected = density.reshape(10, -1).mean(1) * 0.2
    found = torch.histc(action, 10, -1, 1) / len(action)
    assert torch.allclose(found, expected, atol=4e-3)


@pytest.mark.parametrize("squash", [True, False])
def test_the_agent_acts_by_samples_of_its_policy_and_its_mean_is_the_deterministic_one(squash):
    agent, obs = make_agent(squash=squash), np.float32([0.3, -1, 2])
    agent.actor.net[-1].bias.data[2:] = -1  # so that the tanh saturates nowhere
    actions = torch.from_numpy(np.stack([agent.act(obs) for _ in range(2500)]))
    assert actions.shape == (2500, 2)
    with torch.no_grad():
        mean, log_std = agent.actor(torch.from_numpy(obs)[None])
        deterministic = agent.actor.mean_action(torch.from_numpy(obs))
    noise = ((torch.atanh(actions) if squash else actions) - mean) / log_std.exp()
    assert torch.allclose(noise.mean(0), torch.zeros(2), atol=0.08)
    assert torch.allclose(noise.std(0), torch.ones(2), atol=0.05)
    assert torch.allclose(deterministic, mean[0].tanh() if squash else mean[0])
    stream = torch.Generator().manual_seed(np.random.SeedSequence(1).generate_state(3).tolist()[0])
    assert torch.allclose(noise[:5], torch.stack([torch.randn(2, generator=stream) for _ in range(5)]), atol=1e-4)


def test_random_actions_are_uniform_over_the_box():
    agent = make_agent(2, 3, squash=False)
    actions = np.stack([agent.random_action() for _ in range(4000)])
    assert actions.shape == (4000, 3)
    assert -1 <= actions.min() < -0.99 and 0.99 < actions.max() <= 1
    assert np.allclose(actions.mean(0), 0, atol=0.05)
    assert np.allclose(actions.var(0), 1 / 3, atol=0.03)


@pytest.mark.parametrize("actor_std", ["shared", 0.1])
def test_standard_deviation_shared_or_fixed(actor_std):
    actor = make_actor(actor_std=actor_std)
    _, log_std = actor(torch.randn(5, 3))
    assert torch.allclose(log_std.exp(), torch.full((5, 2), 1.0 if actor_std == "shared" else 0.1))
    learned = [name for name, _ in actor.named_parameters() if name == "log_std"]
    assert learned == (["log_std"] if actor_std == "shared" else [])


def test_log_std_stays_within_its_bounds():
    _, log_std = make_actor()(1e4 * torch.randn(100, 3))
    assert (log_std.min(), log_std.max()) == (-20, 2)


# ---------------------------------------------------------------------------------------------------- the critics


def test_ensemble_is_its_members_side_by_side():
    ensemble = sac.Ensemble(3, 5, sac.Args(hidden_size=8, activation="tanh"))
    obs, action = torch.randn(7, 4), torch.randn(7, 1)
    assert [tuple(weight.shape) for weight in ensemble.weights] == [(3, 5, 8), (3, 8, 8), (3, 8, 1)]
    for j in range(3):
        x = torch.cat([obs, action], 1)
        for i, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
            x = torch.nn.functional.linear(torch.tanh(x) if i else x, weight[j].T, bias[j, 0])
        assert torch.allclose(ensemble(obs, action)[j], x[:, 0], atol=1e-6)


def test_networks_begin_as_those_of_the_papers_code():
    """Weights uniform in +-sqrt(6 / (in + out)) (Glorot and Bengio 2010, eq. 16), biases of 0."""
    args = sac.Args(hidden_size=100)
    actor, ensemble = sac.Actor(25, 10, args), sac.Ensemble(5, 25, args)
    layers = [(layer.weight.T[None], layer.bias) for layer in actor.net[::2]]
    layers += zip(ensemble.weights, ensemble.biases, strict=True)
    for (weight, bias), fan_sum in zip(layers, [125, 200, 120, 125, 200, 101], strict=True):
        bound = math.sqrt(6 / fan_sum)
        assert 0.9 * bound <= weight.abs().max() <= bound and not bias.any()
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not torch.equal(ensemble.weights[0][0], ensemble.weights[0][1])


def test_critic_target_by_hand():
    # ordinary, terminated, truncated (a truncated transition is stored as not terminated)
    reward, terminated, next_q = torch.tensor([[1.0, 1.0, 2.0], [0, 1, 0], [10, 10, 20]])
    log_prob = torch.tensor([0.0, 5.0, 2.0])
    target = sac.critic_target(reward, terminated, next_q, log_prob, 0.5, 0.9)
    assert target.tolist() == pytest.approx([10, 1, 2 + 0.9 * 19])


def test_backups_by_hand():
    q = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    assert sac.backup(q, "min").tolist() == sac.backup(q, "value").tolist() == [[1, 2]]
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
    assert sac.actor_loss(log_prob, q, 0.5).item() == pytest.approx(-3.25)


def whole_target(agent, batch, noise, pair, temperature):
    """The critics' target of an update, computed apart."""
    _, _, reward, next_obs, terminated = batch
    with torch.no_grad():
        mean, log_std = agent.actor(next_obs)
        normal = dist.Normal(mean, log_std.exp())
        squashed = dist.TransformedDistribution(normal, dist.TanhTransform(cache_size=1))
        next_action = squashed.transforms[0](mean + log_std.exp() * noise)
        log_prob = squashed.log_prob(next_action).sum(-1)
        q = agent.target(next_obs, next_action)
        q = q if pair is None else q[pair]
        kind = agent.args.critic_backup
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
def test_critics_regress_on_the_target_of_their_variant(settings, entropy_weight):
    agent, batch = make_agent(**settings), make_batch()
    for p in agent.target.parameters():
        p.data.mul_(1.5)  # so that the target network is not the online one
    noise = torch.randn(32, 2, generator=torch.Generator().manual_seed(2))
    pair = torch.tensor([3, 1]) if agent.args.critic_backup == "redq" else None
    target = whole_target(agent, batch, noise, pair, entropy_weight)
    q = agent.critic(batch[0], batch[1]).detach()
    _, metrics = agent.critic_gradients(*batch, noise, pair)
    expected = 0.5 * sum(torch.mean((q[j] - target.expand_as(q)[j]) ** 2) for j in range(len(q)))
    assert metrics["critic_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(metrics["q_values"], q)
    assert torch.allclose(metrics["target_values"], target, atol=1e-5)
    spread = q.mean(0)  # over the batch, of the critics' mean: their disagreement is no part of it
    assert metrics["q_values_std"].item() == pytest.approx(spread.numpy().std(), rel=1e-4)


def test_redq_draws_every_pair_of_critics(monkeypatch):
    agent = make_agent(num_critics=4, critic_backup="redq", num_critic_updates=100, batch_size=2)
    calls = spy(monkeypatch, agent, "critic_gradients")
    agent.update(filled_buffer(), 0)
    assert {tuple(sorted(arguments[-1].tolist())) for arguments, _ in calls} == {
        (i, j) for j in range(4) for i in range(j)
    }


class OneBatch:
    """A replay buffer that always returns the same transitions."""

    def __init__(self, *batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch[0])

    def __getitem__(self, index):
        return self.batch


def test_value_network_finds_its_fixed_point():
    """One state, reward 1, no termination, no entropy: V = r / (1 - gamma) = 2 at gamma = 0.5."""
    settings = {"critic_backup": "value", "temperature": 0.0, "gamma": 0.5, "tau": 0.05, "critic_lr": 3e-3}
    agent = make_agent(1, 1, batch_size=64, num_critic_updates=600, **settings)
    obs, reward, terminated = torch.ones(64, 1), torch.ones(64), torch.zeros(64)
    agent.update(OneBatch(obs, torch.rand(64, 1) * 2 - 1, reward, obs, terminated), 0)
    assert agent.value(obs).mean().item() == pytest.approx(2, abs=0.05)
    assert agent.target(obs).mean().item() == pytest.approx(2, abs=0.05)


def test_value_network_includes_the_entropy_of_the_policy():
    """gamma = 0 and reward 0: Q = 0, so V = temperature * entropy of the policy."""
    settings = {"critic_backup": "value", "temperature": 0.5, "gamma": 0.0, "critic_lr": 3e-3, "actor_lr": 1e-12}
    agent = make_agent(1, 1, batch_size=256, num_critic_updates=600, **settings)
    obs, zeros = torch.ones(256, 1), torch.zeros(256)
    agent.update(OneBatch(obs, torch.rand(256, 1) * 2 - 1, zeros, obs, zeros), 0)
    with torch.no_grad():
        _, log_prob = agent.actor.sample(*agent.actor(torch.ones(100_000, 1)), torch.randn(100_000, 1))
    assert agent.value(obs[:1]).item() == pytest.approx(-0.5 * log_prob.mean().item(), abs=0.03)


# ------------------------------------------------------------------------------------------------ the whole update


def plain_updates(agent, buffer, steps):
    """The updates written out from the papers: an Adam for each network, PyTorch's own distributions, no sharing."""
    args = agent.args
    actor, critic, value, target = copy.deepcopy((agent.actor, agent.critic, agent.value, agent.target))
    log_temperature = agent.log_temperature.detach().clone().requires_grad_()
    seeds = np.random.SeedSequence(args.seed).generate_state(3).tolist()
    _, replay, stream = (torch.Generator().manual_seed(seed) for seed in seeds)

    def adam(parameters, rate):
        return torch.optim.Adam(parameters, rate)

    optimizers = [adam(actor.parameters(), args.actor_lr), adam(critic.parameters(), args.critic_lr)]
    optimizers += [adam(value.parameters(), args.critic_lr) if value else None]
    optimizers += [adam([log_temperature], args.temperature_lr)]

    def minimise(which, loss):
        for optimizer in filter(None, optimizers):
            optimizer.zero_grad()
        loss.backward()
        optimizers[which].step()

    def policy(obs, noise):
        mean, log_std = actor(obs)
        normal = dist.Normal(mean, log_std.exp())
        u = mean + log_std.exp() * noise
        if not args.squash:
            return u, normal.log_prob(u).sum(-1), normal.log_prob(u.detach()).sum(-1)
        tanh = dist.TanhTransform(cache_size=1)
        action = tanh(u)
        fixed = normal.log_prob(u.detach()) - tanh.log_abs_det_jacobian(u, action).detach()
        return action, dist.TransformedDistribution(normal, tanh).log_prob(action).sum(-1), fixed.sum(-1)

    num_updates = 0
    for step in steps:
        if args.lr_schedule == "linear":
            share, rates = (
                1 - step / args.total_steps,
                (args.actor_lr, args.critic_lr, args.critic_lr, args.temperature_lr),
            )
            for optimizer, rate in zip(optimizers, rates, strict=True):
                if optimizer:
                    optimizer.param_groups[0]["lr"] = rate * share
        for index in torch.randint(len(buffer), (args.num_critic_updates, args.batch_size), generator=replay):
            obs, action, reward, next_obs, terminated = buffer[index]
            temperature = log_temperature.exp().item() if args.temperature == "auto" else args.temperature
            bonus = temperature if args.backup_entropy else 0.0
            noise = torch.randn(action.shape, generator=stream)
            with torch.no_grad():
                if value:
                    future = target(next_obs)
                else:
                    next_action, log_prob, _ = policy(next_obs, noise)
                    q = target(next_obs, next_action)
                    if args.critic_backup == "redq":
                        q = q[torch.rand(args.num_critics, generator=stream).topk(2).indices]
                    if args.critic_backup == "double-q":
                        future = torch.stack([q[1], q[0]])
                    else:
                        future = q.mean(0) if args.critic_backup == "mean" else q.amin(0)
                    future = future - bonus * log_prob
                y = (reward + args.gamma * (1 - terminated) * future).expand(args.num_critics, -1)
            minimise(1, sum(0.5 * ((critic(obs, action)[j] - y[j]) ** 2).mean() for j in range(args.num_critics)))
            if value:
                with torch.no_grad():
                    new_action, log_prob, _ = policy(obs, noise)
                    v = critic(obs, new_action).amin(0) - bonus * log_prob
                minimise(2, 0.5 * ((value(obs)[0] - v) ** 2).mean())
            num_updates += 1
            if num_updates % args.target_update_period == 0:
                for old, new in zip(target.parameters(), (value or critic).parameters(), strict=True):
                    old.data = (1 - args.tau) * old.data + args.tau * new.data
        many = obs.repeat(args.num_actor_samples, 1)
        noise = torch.randn(len(many), action.shape[1], generator=stream)
        action, log_prob, fixed_log_prob = policy(many, noise)
        q = critic(many, action)
        q = q.amin(0) if args.critic_backup in ("min", "value") else q.mean(0)
        objective = q if args.actor_gradient == "reparametrize" else fixed_log_prob * q.detach()
        minimise(0, (temperature * log_prob - objective).mean())
        if args.temperature == "auto":
            target_entropy = -action.shape[1] / 2 if args.target_entropy == "auto" else args.target_entropy
            minimise(3, -(log_temperature.exp() * (log_prob.detach() + target_entropy)).mean())
    return [*actor.parameters(), *critic.parameters(), *(value.parameters() if value else [])], target, log_temperature


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"critic_backup": "value", "temperature": 0.3, "lr_schedule": "linear", "total_steps": 10},
        {"critic_backup": "redq", "num_critics": 4, "num_critic_updates": 3, "target_update_period": 2, "tau": 0.3},
        {"critic_backup": "double-q", "actor_std": "shared", "lr_schedule": "linear", "total_steps": 20, "gamma": 0.7},
        {"actor_gradient": "reinforce", "num_actor_samples": 3, "critic_backup": "mean", "target_entropy": 0.5},
        {"actor_gradient": "reinforce", "num_actor_samples": 2, "squash": False, "temperature": 0.1, "critic_lr": 1e-3},
        {"temperature": 0.4, "backup_entropy": False, "actor_lr": 1e-3, "tau": 1.0, "target_update_period": 3},
        {"seed": 5, "temperature_lr": 1e-2, "actor_lr": 1e-2},
    ],
)
def test_updates_are_those_of_the_papers_written_out_plainly(settings):
    agent, buffer = make_agent(batch_size=32, **settings), filled_buffer()
    for p in agent.target.parameters():
        p.data.mul_(1.5)  # so that the target network is not the online one
    steps = range(5)
    expected, target, log_temperature = plain_updates(agent, buffer, steps)
    for step in steps:
        agent.update(buffer, step)
    found = [*agent.actor.parameters(), *agent.critic.parameters(), *(agent.value.parameters() if agent.value else [])]
    for a, b in zip([*found, *agent.target.parameters()], [*expected, *target.parameters()], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-5), (a - b).abs().max()
    assert agent.log_temperature.item() == pytest.approx(log_temperature.item(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------- the targets


def test_soft_targets_are_polyak_averages():
    agent = make_agent(tau=0.1, critic_lr=1e-2)
    old = copies(agent.target)
    agent.update(filled_buffer(), 0)
    expected = [0.9 * t + 0.1 * p for t, p in zip(old, copies(agent.critic), strict=True)]
    assert all(torch.allclose(p, e) for p, e in zip(agent.target.parameters(), expected, strict=True))


def test_hard_targets_copy_exactly_at_the_period_and_not_between():
    agent, buffer = make_agent(tau=1.0, target_update_period=3, learning_starts=7), filled_buffer()
    before = copies(agent.target)
    for num_updates in range(1, 7):
        agent.update(buffer, 6 + num_updates)
        if num_updates % 3 == 0:
            assert equal(agent.target, copies(agent.critic))
            before = copies(agent.target)
        else:
            assert equal(agent.target, before)
            assert not equal(agent.critic, before)


def test_several_critic_updates_before_each_of_the_actor_on_fresh_batches(monkeypatch):
    agent = make_agent(num_critic_updates=4)
    calls = {name: spy(monkeypatch, agent, name) for name in ("critic_gradients", "actor_gradients")}
    actor = copies(agent.actor)
    agent.update(filled_buffer(), 0)
    batches = [arguments[0] for arguments, _ in calls["critic_gradients"]]
    assert len(batches) == 4 and len(calls["actor_gradients"]) == 1
    assert not any(torch.equal(batches[i], batches[j]) for i in range(4) for j in range(i))
    taken = [
        agent.optimizer.state[p[0]]["step"].item() for p in ([*agent.critic.parameters()], [*agent.actor.parameters()])
    ]
    assert taken == [4, 1]
    assert not equal(agent.actor, actor)


# ------------------------------------------------------------------------------------------------------ the actor


@pytest.mark.parametrize("estimator", ["reparametrize", "reinforce"])
def test_no_update_touches_another_networks_parameters(estimator, monkeypatch):
    agent = make_agent(actor_gradient=estimator, critic_backup="value")
    taken, original = [], sac.Agent.step
    names = {id(p): name.split(".")[0] for name, p in agent.named_parameters()}

    def watching(self, parameters, gradients):
        before = copies(self)
        original(self, list(parameters), gradients)
        pairs = zip(self.parameters(), before, strict=True)
        taken.append({names[id(p)] for p, old in pairs if not torch.equal(p, old)})
        assert all(p.grad is None for p in self.parameters())

    monkeypatch.setattr(sac.Agent, "step", watching)
    agent.update(filled_buffer(), 0)
    assert taken == [{"critic"}, {"value"}, {"actor", "log_temperature"}]


def test_a_gradient_may_lie_in_memory_in_another_order():
    agents = make_agent(), make_agent()
    gradients, _ = agents[0].actor_gradients(make_batch()[0], torch.randn(32, 2))
    turned = [g.mT.contiguous().mT if g.ndim > 1 else g for g in gradients]
    assert not all(g.is_contiguous() for g in turned)
    for agent, given in zip(agents, (gradients, turned), strict=True):
        agent.step(agent.actor_and_temperature, given)
    assert equal(agents[0].actor, copies(agents[1].actor))


def gradients_on_a_quadratic(estimator, samples, repeats, seed=0):
    """Gradients in (mean, log_std) of E[temperature log pi - Q] for Q = -(a - 1)^2, an unsquashed Gaussian."""
    settings = {"temperature": 0.1, "squash": False, "actor_std": "shared", "actor_gradient": estimator}
    agent = make_agent(1, 1, num_actor_samples=samples, **settings)
    agent.critic = GivenQ(lambda action: -((action - 1) ** 2).squeeze(-1))
    agent.actor.log_std.data.fill_(math.log(0.5))
    last = agent.actor.net[-1]
    last.weight.data.zero_()
    last.bias.data.fill_(0.2)
    names = [name for name, _ in agent.actor.named_parameters()]
    which = [names.index(f"net.{len(agent.actor.net) - 1}.bias"), names.index("log_std")]
    torch.manual_seed(seed)
    found = []
    for _ in range(repeats):
        gradients, _ = agent.actor_gradients(torch.zeros(16, 1), torch.randn(samples * 16, 1))
        found.append([gradients[i].item() for i in which])
    return np.array(found)


@pytest.fixture(scope="module")
def scattered():
    """Gradients of both estimators, of 1 and of more samples a state."""
    reinforce = {n: gradients_on_a_quadratic("reinforce", n, 1500) for n in (1, 10)}
    return reinforce, gradients_on_a_quadratic("reparametrize", 4, 1500)


def test_both_estimators_equal_the_closed_form_in_expectation(scattered):
    # E[Q] = -(m - 1)^2 - s^2 and E[log pi] = -log s + const, so in (m, log s):
    expected = np.array([2 * (0.2 - 1), 2 * 0.5**2 - 0.1])
    for found in (scattered[0][10], scattered[1]):
        error = found.std(0) / math.sqrt(len(found))
        assert np.all(np.abs(found.mean(0) - expected) < 4.5 * error + 1e-6)
        assert np.all(error < 0.02)


def test_reinforce_variance_falls_as_one_over_the_samples(scattered):
    variance = {n: found.var(0) for n, found in scattered[0].items()}
    assert np.allclose(variance[1] / variance[10], 10, rtol=0.25)
    assert np.all(gradients_on_a_quadratic("reparametrize", 1, 300).var(0) < variance[1])


def test_one_state_problem_reaches_the_soft_optimal_policy():
    """The optimum is p(a) ~ exp(Q(a) / temperature). With Q = temperature log of a squashed Gaussian it is that one."""
    temperature, mean, std = 0.3, torch.tensor([0.6, -0.3]), torch.tensor([0.4, 0.7])
    best = make_actor(1, 2)
    for estimator, rate, steps in (("reparametrize", 1e-2, 800), ("reinforce", 5e-3, 3000)):
        agent = make_agent(1, 2, temperature=temperature, actor_gradient=estimator, num_actor_samples=4)

        def q(action):
            u = torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6))
            log_std = std.log().expand_as(u)
            return temperature * best.log_prob(u, (u - mean) / std, log_std)

        agent.critic = GivenQ(q)
        for step in range(steps):
            for group in agent.optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            gradients, _ = agent.actor_gradients(torch.ones(128, 1), torch.randn(512, 2))
            agent.step(agent.actor.parameters(), gradients)
        found_mean, found_log_std = agent.actor(torch.ones(1, 1))
        assert torch.allclose(found_mean[0], mean, atol=0.05), estimator
        assert torch.allclose(found_log_std.exp()[0], std, atol=0.05), estimator


# ------------------------------------------------------------------------------------------------ the temperature


@pytest.mark.parametrize(("target_entropy", "rises"), [(50.0, True), (-50.0, False)])
def test_temperature_moves_towards_its_target_entropy(target_entropy, rises):
    agent = make_agent(target_entropy=target_entropy)
    before = agent.log_temperature.item()
    metrics = agent.update(filled_buffer(), 0)
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
        before = agent.log_temperature.item()
        for step in range(3):
            metrics = agent.update(filled_buffer(), step)
        assert float(metrics["temperature"]) == float(agent.temperature) == pytest.approx(temperature)
        assert agent.log_temperature.item() == before


def test_default_target_entropy_is_minus_half_the_action_dimension():
    assert make_agent(action_dim=2).target_entropy == -1
    assert make_agent(action_dim=3).target_entropy == -1.5
    assert make_agent(target_entropy=0.5).target_entropy == 0.5


def test_linear_schedule_takes_every_rate_to_zero():
    rates = {"actor_lr": 2e-4, "critic_lr": 1e-3, "temperature_lr": 5e-4}
    agent = make_agent(lr_schedule="linear", critic_backup="value", total_steps=100, **rates)
    expected = {"actor": 2e-4, "critic": 1e-3, "value": 1e-3, "log_temperature": 5e-4}
    names = {id(p): name.split(".")[0] for name, p in agent.named_parameters()}
    for step in (0, 25, 100):
        before = copies(agent)
        agent.update(filled_buffer(), step)
        found = {names[id(group["params"][0])]: group["lr"] for group in agent.optimizer.param_groups}
        assert found == pytest.approx({name: rate * (1 - step / 100) for name, rate in expected.items()})
    changed = [name for (name, p), b in zip(agent.named_parameters(), before, strict=True) if not torch.equal(p, b)]
    assert all(name.startswith("target") for name in changed)


# ---------------------------------------------------------------------------------------------------- the buffer


class Indices(sac.ReplayBuffer):
    """Keeps the indices that it was asked for."""

    def __getitem__(self, index):
        self.asked = [*getattr(self, "asked", []), *index.tolist()]
        return super().__getitem__(index)


def indices_of_an_update(capacity, added, **settings):
    buffer = Indices(capacity, 3, 2, torch.device("cpu"))
    for _ in range(added):
        buffer.add([0] * 3, [0] * 2, 0.0, [0] * 3, False)
    make_agent(hidden_size=2, **settings).update(buffer, 0)
    return torch.tensor(buffer.asked)


def test_buffer_holds_the_last_transitions_across_its_wrap():
    buffer = sac.ReplayBuffer(10, 2, 1, torch.device("cpu"))
    for i in range(27):
        buffer.add([i, -i], [i / 100], 2.0 * i, [i + 1, -i - 1], i % 2 == 0)
    assert len(buffer) == 10
    obs, action, reward, next_obs, terminated = buffer[torch.arange(10)]
    i = obs[:, 0]
    assert sorted(i.tolist()) == [*range(17, 27)]
    assert torch.equal(obs[:, 1], -i)
    assert torch.allclose(action[:, 0], i / 100)
    assert torch.equal(reward, 2 * i)
    assert torch.equal(next_obs, torch.stack([i + 1, -i - 1], 1))
    assert torch.equal(terminated, (i % 2 == 0).float())


def test_updates_sample_the_buffer_uniformly_and_only_what_it_holds():
    counts = torch.bincount(indices_of_an_update(10, 27, batch_size=2000, num_critic_updates=10), minlength=10)
    assert counts.sum() == 20_000
    chi_square = ((counts - 2000.0) ** 2 / 2000).sum().item()
    assert chi_square < 27.9  # 0.1 % of the chi-square distribution with 9 degrees of freedom
    assert set(indices_of_an_update(1000, 3, batch_size=100).tolist()) == {0, 1, 2}
