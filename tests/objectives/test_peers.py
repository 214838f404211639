"""Every method beside other people's code, from rewards to gradients: verl's and TRL's own functions on materialised
log-probs in fp64, Liger's fused loss in fp32. Ours is `Objective.assign_token_weights`, then the fused
kernel.

`make test-peers` runs this in the bench environment; a peer that is not installed is a skip.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from vold.config.schema import ObjectiveConfig
from vold.objectives import PRESETS, build_objective
from vold.types import Group, Prompt, Rollout, Verdict
from vold_kernels import linear_kl, linear_policy_loss

REWARDS = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
LENGTHS = [7, 3, 5, 2, 7, 4]
LONGEST, WIDTH, VOCAB = 7, 6, 41
MASK_BT = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]


@dataclass(frozen=True)
class Problem:
    """B responses padded to T tokens; the old policy and the teacher are some way off."""

    hidden_BTD: Tensor
    weight_VD: Tensor
    ids_BT: Tensor
    old_BT: Tensor
    teacher_BT: Tensor

    @property
    def leaves(self):
        return self.hidden_BTD, self.weight_VD

    def logp_BT(self, with_entropy: bool = False):
        logp_BTV = (self.hidden_BTD @ self.weight_VD.T).log_softmax(-1)
        logp_BT = logp_BTV.gather(2, self.ids_BT[..., None])[..., 0]
        return (logp_BT, -(logp_BTV.exp() * logp_BTV).sum(-1)) if with_entropy else logp_BT


def problem(dtype: torch.dtype = torch.float64) -> Problem:
    torch.manual_seed(0)
    shape = (len(LENGTHS), LONGEST)
    hidden, weight = torch.randn(*shape, WIDTH, dtype=torch.float64), torch.randn(VOCAB, WIDTH, dtype=torch.float64)
    ids, shifts = torch.randint(0, VOCAB, shape), torch.randn(2, *shape, dtype=torch.float64)
    logp = Problem(hidden, weight, ids, ids, ids).logp_BT()
    values = (hidden, weight, logp + 0.25 * shifts[0], logp + shifts[1])
    hidden, weight, old, teacher = (value.to(dtype) for value in values)
    return Problem(hidden.requires_grad_(), weight.requires_grad_(), ids, old, teacher)


def ours(case: Problem, **keys) -> tuple[Tensor, Tensor]:
    """The loss by a config, and advantages [B] for peers that take them."""
    objective = build_objective(ObjectiveConfig(**keys), LONGEST)
    groups, lengths = [], iter(LENGTHS)
    for number, rewards in enumerate(REWARDS):
        prompt = Prompt(f"p{number}", (1,), "")
        rollouts = tuple(Rollout(prompt, (0,) * next(lengths), (), "stop", "") for _ in rewards)
        verdicts = tuple(Verdict("correct" if reward else "wrong", None, "") for reward in rewards)
        groups.append(Group(prompt, rollouts, verdicts, tuple(rewards)))
    samples = objective.assign_token_weights(groups)
    per_token = lambda name: torch.tensor(  # noqa: E731
        [getattr(s, name) for s in samples for _ in s.response_ids], dtype=torch.float64
    )
    batch = SimpleNamespace(
        logp_old_N=case.old_BT[MASK_BT],
        logp_teacher_N=case.teacher_BT[MASK_BT],
        advantage_N=per_token("advantage"),
        pg_weight_N=per_token("pg_weight"),
        kl_weight_N=per_token("kl_weight"),
        sequence_N=torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)),
        logp_reference_N=case.teacher_BT[MASK_BT] if objective.reference_beta else None,
        reference_weight_N=per_token("reference_weight"),
    )
    terms = objective.policy_terms(batch)
    hidden_ND, ids_N = case.hidden_BTD[MASK_BT], case.ids_BT[MASK_BT]
    loss = linear_policy_loss(hidden_ND, case.weight_VD, ids_N, terms, **objective.loss_options()).loss
    return loss, torch.tensor([s.advantage for s in samples], dtype=torch.float64)


def assert_same(case: Problem, actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert expected.abs() > 1e-5, "nothing to compare with"
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    gradients = (torch.autograd.grad(loss, case.leaves, retain_graph=True) for loss in (actual, expected))
    for mine, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 1e-3
        assert (mine - theirs).norm() / theirs.norm() < tolerance


# -- verl ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verl():
    """verl.trainer.ppo.core_algos alone: importing the package pulls in ray, hydra and tensordict."""
    spec = importlib.util.find_spec("verl")
    if spec is None:
        pytest.skip("verl is not installed; make test-peers has it")
    root, before = Path(spec.origin).parent, dict(sys.modules)
    config = type("Config", (SimpleNamespace,), {"get": lambda self, key, default=None: getattr(self, key, default)})
    device = {"get_device_name": lambda: "cpu", "get_torch_device": lambda: torch.cpu}
    stubs: dict[str, dict] = {name: {"__path__": [str(root / name.replace(".", "/"))]} for name in ("utils", "trainer")}
    stubs |= {"trainer.ppo": {"__path__": [str(root / "trainer/ppo")]}, "workers": {"__path__": []}}
    stubs |= {"utils.device": device, "trainer.config": {"AlgoConfig": dict}, "workers.config": {"ActorConfig": config}}
    for name, values in stubs.items():
        stub(f"verl.{name}", **values)
    stub("verl", __path__=[str(root)])
    stub("omegaconf", DictConfig=dict)
    stub("tensordict", TensorDict=dict)
    sys.modules["verl.utils"].as_torch_index = sys.modules["verl.utils"].group_mean_std = None
    yield importlib.import_module("verl.trainer.ppo.core_algos"), config
    for name in set(sys.modules) - set(before):
        del sys.modules[name]
    sys.modules.update(before)


def stub(name: str, **values) -> None:
    module = ModuleType(name)
    vars(module).update(values)
    sys.modules[name] = module


def verl_loss(verl, case: Problem, name: str, mode: str, low: float, high: float, *, by_std: bool = True) -> Tensor:
    algorithms, config = verl
    scores_BT = torch.zeros(MASK_BT.shape, dtype=torch.float64)
    scores_BT[:, 0] = torch.tensor([reward for row in REWARDS for reward in row])
    index = np.repeat(np.arange(len(REWARDS)), 3)
    mask_BT = MASK_BT.double()
    advantage_BT, _ = algorithms.compute_grpo_outcome_advantage(
        scores_BT, mask_BT, index, norm_adv_by_std_in_grpo=by_std
    )
    settings = config(
        clip_ratio=low,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=1e9,
        global_batch_info={},
        tau_pos=1.0,
        tau_neg=1.05,
    )
    loss = algorithms.get_policy_loss_fn(name)
    return loss(case.old_BT, case.logp_BT(), advantage_BT, mask_BT, loss_agg_mode=mode, config=settings)[0]


VERL = {
    "grpo": ("vanilla", "token-mean", 0.2, 0.3),
    "dapo": ("vanilla", "token-mean", 0.2, 0.28),
    "gspo": ("gspo", "seq-mean-token-mean", 3e-4, 4e-4),
    "cispo": ("cispo", "token-mean", 1.0, 4.0),
    "sapo": ("sapo", "seq-mean-token-mean", 0.2, 0.3),
}


VERL_TOLERANCE = {"token-mean": 1e-9, "seq-mean-token-mean": 1e-8}  # the latter divides by the length + 1e-8


@pytest.mark.parametrize("name", VERL)
def test_verl(verl, name):
    case = problem()
    actual, _ = ours(case, preset=name, overlong_share=0.0)
    assert_same(case, actual, verl_loss(verl, case, *VERL[name]), VERL_TOLERANCE[VERL[name][1]])


def test_verl_gspo_within_its_bounds(verl):
    """With bounds that hold some of the sequences' ratios, and not others."""
    case = problem()
    actual, _ = ours(case, preset="gspo", clip_eps_low=0.05, clip_eps_high=0.05)
    expected = verl_loss(verl, case, "gspo", "seq-mean-token-mean", 0.05, 0.05)
    assert_same(case, actual, expected, VERL_TOLERANCE["seq-mean-token-mean"])


def test_verl_dr_grpo(verl):
    case = problem()
    actual, _ = ours(case, preset="dr-grpo")
    expected = verl_loss(verl, case, "vanilla", "seq-mean-token-sum-norm", 0.2, 0.2, by_std=False)
    assert_same(case, actual, expected)


@pytest.mark.parametrize("name", ["kdrl", "kdrl-response", "vold-unmasked"])
def test_verl_with_its_k2_penalty(verl, name):
    """Its policy loss and its k2 estimate to the teacher in the place of the reference, added up as its actor does; the
    mask is a factor of the latter."""
    case, preset = problem(), build_objective(ObjectiveConfig(preset=name), LONGEST)
    algorithms, _ = verl
    shares_B = torch.tensor([share for row in REWARDS for share in preset.routing(row)], dtype=torch.float64)
    penalty_BT = algorithms.kl_penalty(case.logp_BT(), case.teacher_BT, "k2") * shares_B[:, None]
    expected = verl_loss(verl, case, "vanilla", "token-mean", preset.clip_eps_low, preset.clip_eps_high)
    expected = expected + 0.5 * algorithms.agg_loss(penalty_BT, MASK_BT.double(), "token-mean")
    actual, _ = ours(case, preset=name, beta=0.5)
    assert_same(case, actual, expected)


def test_verl_with_its_k3_penalty_to_a_reference(verl):
    """low_var_kl, each response averaged first, as GRPO is published."""
    case = problem()
    algorithms, _ = verl
    penalty_BT = algorithms.kl_penalty(case.logp_BT(), case.teacher_BT, "low_var_kl")
    mode = "seq-mean-token-mean"
    expected = verl_loss(verl, case, "vanilla", mode, 0.2, 0.2)
    expected = expected + 0.04 * algorithms.agg_loss(penalty_BT, MASK_BT.double(), mode)
    actual, _ = ours(case, preset="grpo-reference")
    assert_same(case, actual, expected, VERL_TOLERANCE[mode])


def test_verl_entropy_bonus(verl):
    case = problem()
    algorithms, _ = verl
    entropy_BT = case.logp_BT(with_entropy=True)[1]
    expected = verl_loss(verl, case, "vanilla", "token-mean", 0.2, 0.3)
    expected = expected - 0.1 * algorithms.agg_loss(entropy_BT, MASK_BT.double(), "token-mean")
    actual, _ = ours(case, preset="grpo", entropy_bonus=0.1)
    assert_same(case, actual, expected)


NO_TRL = "trl is not installed; make test-peers has it"

# -- TRL -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:  # pytest put tests/ on the path, and trl takes tests/vllm for vLLM
        patch.setattr(sys, "path", [path for path in sys.path if Path(path).name != "tests"])
        return pytest.importorskip("trl.trainer.grpo_trainer", reason=NO_TRL)


def trl_loss(trl: ModuleType, case: Problem, advantage_B: Tensor, loss_type: str, level: str, low: float, high: float):
    """`GRPOTrainer._compute_loss` on a trainer that has nothing but what the method reads."""
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_args, **_keywords: (*case.logp_BT(with_entropy=True), None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=accelerator,
        args=SimpleNamespace(sapo_temperature_neg=1.05, sapo_temperature_pos=1.0, delta=None, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        epsilon_low=low,
        epsilon_high=high,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=LONGEST,
        sapo_temperature_neg=1.05,
        sapo_temperature_pos=1.0,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    prompts = torch.zeros(len(LENGTHS), 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": prompts,
        "completion_ids": case.ids_BT,
        "completion_mask": MASK_BT.long(),
        "advantages": advantage_B,
        "old_per_token_logps": case.old_BT,
        "num_items_in_batch": MASK_BT.sum(),
    }
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


PEERS: dict[str, tuple[str, str, float, float, dict]] = {
    "grpo": ("dapo", "token", 0.2, 0.3, {}),
    "grpo as published": (
        "grpo",
        "token",
        0.2,
        0.2,
        {"preset": "grpo", "normaliser": "sequences", "clip_eps_high": 0.2},
    ),
    "dr-grpo": ("dr_grpo", "token", 0.2, 0.2, {}),
    "dapo": ("dapo", "token", 0.2, 0.28, {"preset": "dapo", "overlong_share": 0.0}),
    "gspo": ("grpo", "sequence", 3e-4, 4e-4, {}),
    "gspo within bounds": (
        "grpo",
        "sequence",
        0.05,
        0.05,
        {"preset": "gspo", "clip_eps_low": 0.05, "clip_eps_high": 0.05},
    ),
    "sapo": ("sapo", "token", 0.2, 0.3, {}),
    "cispo": ("cispo", "token", 0.2, 5.0, {}),  # theirs: the bound itself
    "cispo with weights at the bound": ("cispo", "token", 0.2, 1.1, {"preset": "cispo", "clip_eps_high": 0.1}),
}


@pytest.mark.parametrize("name", PEERS)
def test_trl(trl, name):
    case, (*settings, keys) = problem(), PEERS[name]
    actual, advantage_B = ours(case, **(keys or {"preset": name}))
    tolerance = 1e-6 if name == "sapo" else 1e-9  # its gate temperature of 1.05 is a float32
    assert_same(case, actual, trl_loss(trl, case, advantage_B, *settings), tolerance)


@pytest.mark.parametrize(("alpha", "kind"), [(0.5, "jsd"), (1.0, "reverse_kl"), (0.0, "forward_kl")])
def test_trl_sdpo(alpha, kind):
    """SDPO's divergence over the student's top and one bucket for the rest, token by token."""
    theirs = pytest.importorskip(
        "trl.experimental.sdpo.loss_utils", reason="trl is not installed; make test-peers has it"
    )
    case, preset = problem(), PRESETS["sdpo"]
    torch.manual_seed(1)
    teacher_ND = case.hidden_BTD.detach()[MASK_BT] + 0.5 * torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64)
    hidden_ND, weight_N = case.hidden_BTD[MASK_BT], torch.rand(sum(LENGTHS), dtype=torch.float64)
    settings = {"distillation_topk": 10, "distillation_alpha": alpha, "distillation_add_tail": True}
    teacher_logits_NV = teacher_ND @ case.weight_VD.detach().T
    logits_NV = hidden_ND @ case.weight_VD.T
    expected = theirs.compute_topk_self_distillation_loss(logits_NV, teacher_logits_NV, **settings)
    options = replace(preset, divergence=replace(preset.divergence, name=kind, top_k=10)).divergence_options()
    heads = (hidden_ND, case.weight_VD, teacher_ND, case.weight_VD.detach())
    actual = linear_kl(*heads, weight_N=weight_N, **options)
    torch.testing.assert_close(actual.kl_N, expected.detach(), rtol=1e-9, atol=1e-9)
    assert_same(case, actual.loss, (weight_N * expected).sum())


# -- Liger -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PEERS)
def test_liger(name):
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    case, (loss_type, level, low, high, keys) = problem(torch.float32), PEERS[name]
    actual, advantage_B = ours(case, **(keys or {"preset": name}))
    loss: Callable = liger.LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        epsilon_low=low,
        epsilon_high=high,
        loss_type=loss_type,
        max_completion_length=LONGEST,
        importance_sampling_level=level,
    )
    mask_BT, advantage_B = MASK_BT.float(), advantage_B.float()
    expected = loss(
        case.hidden_BTD, case.weight_VD, case.ids_BT, mask_BT, advantage_B, old_per_token_logps=case.old_BT
    )[0]
    assert_same(case, actual, expected, 1e-5)
