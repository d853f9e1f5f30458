"""Adversarial inputs: attacks find them, within bounds, and leave the network as it was."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import Small, make_small

pytest.importorskip("pytorch_ood")
from tie_ext.cli.classifier import classifier
from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Candidates
from tie_ext.outliers.noise import Noise
from tie_ext.scores.decision import decide, ood_score
from tie_ext.scores.threshold import SPLIT_SEED, conformal_threshold
from tie_ext.training.attach import attach

sys.path.append(str(Path(__file__).parent / "bench"))
import adversarial_inputs
import fooling_network
import fooling_page

N = 3
"""Classes."""


def stripes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of three classes: a band at the top, in the middle or at the bottom, on noise."""
    rng = torch.Generator().manual_seed(seed)
    strength, brightness = torch.rand(2, count, 1, 1, 1, generator=rng)
    x, y = 0.5 * strength * torch.rand(count, 1, 28, 28, generator=rng), torch.arange(count) % N
    for image, label, bright in zip(x, y.tolist(), brightness, strict=True):
        image[:, 9 * label : 9 * label + 6] += 0.2 + 0.3 * bright
    return x, y


@pytest.fixture(scope="module")
def toy() -> tuple[TIENet, dict]:
    """A network that knows its classes, and its detectors."""
    net, (x, y) = make_small(), stripes(240, 0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    logits, h = adversarial_inputs.outputs(net.eval(), [x])
    scores = adversarial_inputs.host_scores(net, h, y)
    logits, h = adversarial_inputs.outputs(net, [stripes(240, 1)[0]])
    scores["two"] = adversarial_inputs.combined(
        [scores["Mahalanobis++"], scores["ViM"]], logits[:120], h[:120]
    )
    return net, {
        name: adversarial_inputs.with_threshold(score, logits[120:], h[120:])
        for name, score in scores.items()
    }


def asked(count: int) -> torch.Tensor:
    return torch.arange(count) % N


def climbed(net, start, y, steps, detector=None):
    """Images after so many steps."""
    return dict(adversarial_inputs.ascend(net, start, y, detector, marks=(steps,)))[steps]


def probability(net: TIENet, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net(x).softmax(1).gather(1, y[:, None]).squeeze(1)


def test_ascent_raises_the_probability_of_the_class_and_stays_in_range(toy):
    net, _ = toy
    start, y = torch.rand(12, 1, 28, 28), asked(12)
    x = climbed(net, start, y, 40)
    assert (probability(net, x, y) >= probability(net, start, y)).all()
    assert probability(net, x, y).min() > 0.99
    assert x.shape == start.shape
    assert 0 <= x.min() < x.max() <= 1


def test_ascent_keeps_to_a_range_of_each_channel():
    low, high = (-1.0, 0.0, -2.0), (1.0, 0.5, 3.0)
    net = TIENet(Small(N, 3), N, (3, 28, 28), low, high).eval()
    x = climbed(net, net.from_unit(torch.rand(6, 3, 28, 28)), asked(6), 200)
    assert (x >= net.low).all()
    assert (x <= net.high).all()
    reached = [
        (x.amin((0, 2, 3)) == net.low.flatten()).all(),
        (x.amax((0, 2, 3)) == net.high.flatten()).all(),
    ]
    assert all(reached)  # the bounds did hold something back


def test_no_step_leaves_images_where_they_started(toy):
    net, detectors = toy
    start = torch.rand(6, 1, 28, 28)
    assert torch.equal(climbed(net, start, asked(6), 0), start)
    assert torch.equal(climbed(net, start, asked(6), 0, detectors["ViM"]), start)
    near = climbed(net, start, asked(6), 1) - start
    assert near.abs().max() == pytest.approx(adversarial_inputs.RATE)


@pytest.mark.parametrize("name", ["Mahalanobis", "Mahalanobis++", "ViM", "two"])
def test_who_sees_the_detector_is_accepted_more_often(toy, name):
    net, detectors = toy
    start, y, detector = torch.rand(30, 1, 28, 28), asked(30), detectors[name]
    blind, adaptive = (
        adversarial_inputs.verdict(
            net, detector, Candidates(climbed(net, start, y, 100, seen), y)
        )[0]["found"]
        for seen in (None, detector)
    )
    assert adaptive > blind + 0.5


def test_a_generator_that_sees_the_detector_is_accepted_more_often(toy, monkeypatch):
    monkeypatch.setattr(adversarial_inputs, "BATCH", 16)
    net, detectors = toy
    y, detector = asked(60), detectors["ViM"]
    found = [adversarial_inputs.invert(net, y, 60, 0, seen) for seen in (None, detector)]
    blind, adaptive = (
        adversarial_inputs.verdict(net, detector, Candidates(x, y))[0]["found"] for x in found
    )
    assert adaptive > blind + 0.3
    assert all(0 <= x.min() < x.max() <= 1 for x in found)


def test_the_same_seed_finds_the_same_images_and_another_does_not(toy, monkeypatch):
    monkeypatch.setattr(adversarial_inputs, "BATCH", 4)
    net, detectors = toy
    before = torch.random.get_rng_state()
    first, again, other = (
        adversarial_inputs.invert(net, asked(6), 3, seed, detectors["energy"])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    start = torch.rand(6, 1, 28, 28)
    assert torch.equal(climbed(net, start, asked(6), 5), climbed(net, start, asked(6), 5))


def test_who_is_blind_sees_the_id_logits_alone(toy, monkeypatch):
    monkeypatch.setattr(adversarial_inputs, "BATCH", 4)
    net, _ = toy
    other, start = copy.deepcopy(net), torch.rand(4, 1, 28, 28)
    torch.nn.init.constant_(other.garbage.weight, 3.0)
    assert torch.equal(*(climbed(of, start, asked(4), 5) for of in (net, other)))
    assert torch.equal(*(adversarial_inputs.invert(of, asked(4), 3, 0) for of in (net, other)))


@pytest.mark.parametrize("detector", [None, "ViM"])
def test_the_network_is_left_as_it_was(toy, detector):
    net, detectors = toy
    net.train()
    net.fc.weight.requires_grad_(False)
    try:
        before = {name: value.clone() for name, value in net.state_dict().items()}
        flags = [parameter.requires_grad for parameter in net.parameters()]
        start = torch.rand(6, 1, 28, 28)
        kept = start.clone()
        climbed(net, start, asked(6), 3, detectors.get(detector))
        adversarial_inputs.invert(net, asked(6), 3, 0, detectors.get(detector))
        adversarial_inputs.verdict(net, detectors["ViM"], Candidates(start, asked(6)))
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert flags == [parameter.requires_grad for parameter in net.parameters()]
        assert all(part.training for part in net.modules())
        assert all(
            parameter.grad is None or not parameter.grad.isnan().any()
            for parameter in net.parameters()
        )
        assert torch.equal(start, kept)
        assert not start.requires_grad
    finally:
        net.fc.weight.requires_grad_(True)
        net.eval()


def test_scores_are_the_hosts_own_and_carry_a_gradient(toy):
    from pytorch_ood.detector import GEN, EnergyBased, Mahalanobis, MaxSoftmax, ViM

    from tie_ext.pytorch_ood import MahalanobisPlusPlus

    net, _ = toy
    x, y = stripes(240, 0)
    logits, h = adversarial_inputs.outputs(net, [x])
    mine = adversarial_inputs.host_scores(net, h, y)
    theirs = {
        "MSP": MaxSoftmax.score(logits[:, :N]),
        "energy": EnergyBased.score(logits[:, :N]),
        "GEN": GEN.score(logits[:, :N]),
        "Mahalanobis": Mahalanobis(None).fit_features(h, y).predict_features(h),
        "Mahalanobis++": MahalanobisPlusPlus(None).fit_features(h, y).predict_features(h),
        "ViM": ViM(None, net.feature_size // 2, net.fc.weight, net.fc.bias)
        .fit_features(h, y)
        .predict_features(h),
    }
    assert mine.keys() == theirs.keys()
    for name, score in mine.items():
        assert torch.allclose(score(logits, h), theirs[name], rtol=1e-3, atol=1e-5), name
        x = torch.rand(2, 1, 28, 28, requires_grad=True)
        score(*net.outputs(x)).sum().backward()
        assert x.grad.abs().max() > 0, name


def test_a_head_is_seen_through_every_layer(toy):
    net, _ = toy
    with_head = attach(classifier(net), [stripes(60, 0)], N, synthesizers=[Noise(net)])
    logits, h = adversarial_inputs.outputs(with_head, [stripes(240, 1)[0]])
    detector = adversarial_inputs.with_threshold(adversarial_inputs.garbage_score, logits, h)
    start, y = torch.rand(30, 1, 28, 28), asked(30)
    blind = climbed(with_head, start, y, 60)
    strict = detector._replace(
        threshold=detector.score(*adversarial_inputs.outputs(with_head, [blind])).min()
    )  # which one of 30 passes without seeing it
    adaptive = climbed(with_head, start, y, 60, strict)
    shares = [
        adversarial_inputs.verdict(with_head, strict, Candidates(x, y))[0]["found"]
        for x in (blind, adaptive)
    ]
    assert shares[0] < 0.1
    assert shares[1] > 0.5


def test_an_adaptive_searcher_stops_where_it_has_found_and_no_later_mark_has_less(toy):
    net, detectors = toy
    start, y = torch.rand(12, 1, 28, 28), asked(12)
    detector = detectors["energy"]
    path = dict(adversarial_inputs.ascend(net, start, y, detector, marks=(0, 1, 2, 4, 8, 30)))
    found = [adversarial_inputs.verdict(net, detector, Candidates(x, y))[1] for x in path.values()]
    assert found[-1].any()
    assert not found[0].all()
    for before, after, x, later in zip(
        found, found[1:], path.values(), list(path.values())[1:], strict=False
    ):
        assert (after | ~before).all()
        assert torch.equal(x[before], later[before])
        assert (x[~before] != later[~before]).flatten(1).any(1).all()
    blind = dict(adversarial_inputs.ascend(net, start, y, marks=(0, 30)))[30]
    assert (blind != path[30]).flatten(1).any(1).any()


def test_level_1_is_where_the_garbage_logit_leads():
    logits = torch.randn(50, N + 1)
    assert torch.equal(
        adversarial_inputs.level_1_score(logits, torch.zeros(50, 1)) > 0, decide(logits).level == 1
    )


@pytest.mark.parametrize("rule", ["zsum", "max"])
def test_the_combination_ranks_as_combined_does(toy, rule):
    from pytorch_ood.detector import GEN, ViM

    from tie_ext import Combined, TIEDetector
    from tie_ext.scores.combination import RULES

    net, _ = toy
    train, held = stripes(240, 0), stripes(240, 1)
    x = torch.cat([stripes(30, 2)[0], torch.rand(30, 1, 28, 28)])
    vim = ViM(net.features, net.feature_size // 2, net.fc.weight, net.fc.bias).fit([train])
    theirs = Combined([TIEDetector(net), vim, GEN(net)], rule=rule).fit([held]).decide(x).score
    logits, h = adversarial_inputs.outputs(net, [held[0]])
    hosts = adversarial_inputs.host_scores(
        net, adversarial_inputs.outputs(net, [train[0]])[1], train[1]
    )
    rows = torch.randperm(240, generator=torch.Generator().manual_seed(SPLIT_SEED))[:120]
    mine = adversarial_inputs.combined(
        [adversarial_inputs.garbage_score, hosts["ViM"], hosts["GEN"]],
        logits[rows],
        h[rows],
        RULES[rule],
    )(*adversarial_inputs.outputs(net, [x]))
    assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3)


def test_the_line_is_the_conformal_one_and_a_verdict_counts_by_it(toy):
    net, detectors = toy
    logits, h = adversarial_inputs.outputs(net, [stripes(240, 1)[0]])
    score = detectors["energy"].score(logits[120:], h[120:])
    assert detectors["energy"].threshold == conformal_threshold(score, 0.05)
    assert (
        score > detectors["energy"].threshold
    ).sum() == 5  # of 120: with the next ID image 6 of 121 at most
    x, y = stripes(12, 2)
    x[:6] = 1.0
    verdict, found = adversarial_inputs.verdict(
        net, detectors["ViM"], Candidates(x, (y + (torch.arange(12) >= 9).long()) % N)
    )
    assert verdict["found"] == 0.25  # half are not accepted, a quarter is called another class
    assert found.tolist() == [False] * 6 + [True] * 3 + [False] * 3
    assert verdict["confidence"] > 0.5
    assert verdict["judged"] is None


def test_a_judge_counts_where_it_agrees_and_accepts(toy):
    net, detectors = toy
    everything, nothing = (
        detectors["ViM"]._replace(threshold=torch.tensor(line)) for line in (1e9, -1e9)
    )
    other = copy.deepcopy(net)
    other.fc.weight.data, other.fc.bias.data = (
        other.fc.weight.data.roll(1, 0),
        other.fc.bias.data.roll(1),
    )  # calls everything by another name
    found = Candidates(*stripes(12, 2))
    judges = {
        1.0: [(net, everything)],
        0.0: [(net, nothing)],
        0.5: [(net, everything), (other, everything)],
    }
    for share, chosen in judges.items():
        assert adversarial_inputs.verdict(net, everything, found, chosen)[0]["judged"] == share
    assert adversarial_inputs.verdict(net, nothing, found, judges[1.0])[0]["judged"] is None


def test_the_objective_is_the_formula_and_lets_go_of_what_is_accepted():
    logits, h, y = (
        torch.randn(3, N + 1),
        torch.tensor([[1.0], [2.0], [7.0]]),
        torch.tensor([0, 2, 1]),
    )
    detector = adversarial_inputs.Detector(
        lambda logits, h: h[:, 0], torch.tensor(2.0), torch.tensor(0.5)
    )
    ce = -logits[:, :N].log_softmax(1)[torch.arange(3), y]
    assert torch.allclose(adversarial_inputs.criterion(logits, h, y, None), ce)
    assert torch.allclose(
        adversarial_inputs.criterion(logits, h, y, detector) - ce,
        torch.tensor([0.0, 1.1, 11.1]).log().clamp_min(0),
        atol=1e-6,
    )


def test_garbage_is_scored_by_its_log_odds():
    logits = torch.randn(4, N + 1)
    assert torch.equal(
        adversarial_inputs.garbage_score(logits, torch.zeros(4, 1)), ood_score(logits)
    )


def test_the_script_fills_the_table_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    import fooling as script

    from tie_ext.cli.images import ImageSet
    from tie_ext.models.backbones import Conv3

    def images(name: str, split: str, root: str, shape: object = None) -> ImageSet:
        x, y = stripes(240, len(name) + len(split))
        return ImageSet((x * 255).byte(), y, tuple("abc"))

    monkeypatch.setattr(script.data, "load", images)
    work = tmp_path / "out" / "work"
    work.mkdir(parents=True)
    for seed in (0, 1):
        torch.manual_seed(seed)
        with_head = TIENet(Conv3(1, N), N, (1, 28, 28), head="multilayer")
        with_head.tau.fill_(0.9)
        with_head.save(tmp_path / f"toy-120x1-conv3-seed{seed}-head.safetensors")
        TIENet(classifier(with_head), N, (1, 28, 28)).save(
            tmp_path / f"toy-120x1-conv3-seed{seed}.safetensors"
        )
    settings = {
        "OUT": tmp_path / "out",
        "FIGURES": tmp_path,
        "GENERATOR": 2,
        "PER_CLASS": 1,
        "HELD": 120,
        "SHOWN": (0, 2),
    }
    for name, value in settings.items():
        monkeypatch.setattr(script, name, value)
    for name, value in {"BATCH": 4, "MARKS": (0, 2)}.items():
        monkeypatch.setattr(adversarial_inputs, name, value)
    monkeypatch.setattr(
        sys, "argv", ["fooling.py", str(tmp_path / "toy-120x1-conv3-seed0.safetensors")]
    )
    for rival in (False, True):
        if rival:  # what was measured at first is not measured again
            one = TIENet(Conv3(1, N), N, (1, 28, 28))
            one.tau.fill_(0.9)
            one.save(work / "toy-120x1-conv3-seed0-tie.safetensors")
        script.main()
    read = lambda: json.loads((tmp_path / "out" / "toy-120x1-conv3-seed0.json").read_text())  # noqa: E731
    before = read()
    torch.nn.init.zeros_(one.fc.weight)
    one.save(work / "toy-120x1-conv3-seed0-tie.safetensors")
    script.main()  # what was found against a network that was trained anew is found again
    record = read()
    assert (
        record["accuracy"]["tie"] != before["accuracy"]["tie"]
        or record["networks"]["tie"] != before["networks"]["tie"]
    )
    for network, same in (("plain", True), ("tie", False)):
        seconds = [
            [took for key, took in of["seconds"].items() if key.startswith(f"{network}, ")]
            for of in (before, record)
        ]
        assert (seconds[0] == seconds[1]) == same
    rows = [
        (row["network"], row["detector"], row["searcher"], row["seen"]) for row in record["rows"]
    ]
    assert (
        len(rows) == len(set(rows)) == (8 * 9 + 2 * 3) * 4
    )  # every detector sees what every searcher found
    forms = {
        (row["detector"] == row["seen"], row["seen"] == "blind", row["form"])
        for row in record["rows"]
    }
    assert forms == {(True, False, "adaptive"), (False, False, "crossed"), (False, True, "blind")}
    assert set(record["rejected"]["plain"]["mnist"]) == set(record["false_alarms"]["plain"])
    assert record["judges"] == ["toy-120x1-conv3-seed1"]
    assert all(
        rate < 0.2
        for of in record["false_alarms"].values()
        for label, rate in of.items()
        if "level" not in label
    )
    assert all(
        ("path" in row) == (not row["searcher"].startswith("generator")) for row in record["rows"]
    )
    assert (tmp_path / "fooling_toy-120x1-conv3-seed0.png").exists()


def test_a_page_shows_every_measure_in_five_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(fooling_page, "RESULTS", tmp_path)
    assert fooling_page.pages() == {}
    numbers = {
        "found": 0.25,
        "confidence": 0.875,
        "judged": None,
        "path": {"10": 0.0, "30": 0.125, "100": 0.25},
    }
    kinds = ("noise", "procedural", "OOD images", "generator, 200 steps")
    rows = [
        {"network": "plain", "searcher": kind, "detector": "ViM", "form": form, **numbers}
        for kind in kinds
        for form in ("blind", "adaptive")
    ]
    for row in rows:
        row["seen"] = "blind" if row["form"] == "blind" else row["detector"]
        if row["searcher"].startswith("generator"):
            del row["path"]
    rows += [{**rows[1], "detector": "combined", "judged": 0.625, "seen": "ViM"}]
    record = {
        "data": "mnist",
        "backbone": "conv3",
        "epochs": 10,
        "seed": 0,
        "images": {"train": 20},
        "networks": {},
        "per_class": 5,
        "judges": ["b"],
        "rows": rows,
    }
    record |= {
        "command": "fooling.py",
        "accuracy": {"plain": 0.9},
        "false_alarms": {"plain": {"ViM": 0.04, "combined": 0.05}},
    }
    record |= {
        "garbage": {"plain": {"id": 0.01, "notmnist": 0.97}},
        "rejected": {"plain": {"notmnist": {"ViM": 0.5, "combined": 0.96}}},
    }
    (tmp_path / "mnist-20x10-conv3-seed0.json").write_text(json.dumps(record))
    front, lines = (text.splitlines() for text in fooling_page.pages().values())
    assert max(line.count("|") for line in [*front, *lines]) == 6
    assert cells_of(fooling_page._found({"mnist": [record]})[2]) == [
        ["plain: ViM", "0 / 12 / 25 / 25 (1)"]
    ]
    strongest, blind, adaptive = (
        line for line in lines if line.startswith("| plain: ViM") and line.count("/") > 4
    )
    assert [cell.strip() for cell in blind.split("|")][2:6] == [
        "0 / 12 / 25",
        "0 / 12 / 25",
        "0 / 12 / 25",
        "25",
    ]
    assert strongest == blind == adaptive
    found = "\n".join(lines)
    assert all(
        number in found for number in ("62", "88", "4.00", "5.00", "90.00", "97.00", "96.00")
    )


def record_of(rows: list[dict], **more) -> dict:
    return {
        "data": "toy",
        "backbone": "conv3",
        "epochs": 1,
        "seed": 0,
        "images": {"train": 20},
        "networks": {},
        "rows": rows,
    } | more


def rows_of(network: str, detector: str, seen: str, found: tuple[float, ...]) -> list[dict]:
    """Ascent from noise, and a generator by the last of what was found."""
    row = {
        "network": network,
        "detector": detector,
        "seen": seen,
        "form": "blind" if seen == "blind" else "adaptive",
        "searcher": "noise",
    }
    path = dict(zip(("10", "30", "100"), found[:3], strict=True))
    return [{**row, "path": path}, {**row, "searcher": "generator, 200 steps", "found": found[3]}]


def cells_of(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


def long_of(where, rows: list[dict]) -> None:
    (where / "long").mkdir()
    (where / "long" / "toy-20x1-conv3-seed0.json").write_text(
        json.dumps({"rows": rows, "command": "fooling_long.py"})
    )


LONG = {"network": "plain", "searcher": "generator", "steps": 1000, "seed": 0}


def test_the_page_says_the_most_that_longer_searches_found(tmp_path, monkeypatch):
    monkeypatch.setattr(fooling_page, "RESULTS", tmp_path)
    rows = [
        {**LONG, "seen": seen, "found": {"level 1": share}}
        for seen, share in (("combined", 0.25), ("combined, largest", 0.5), ("blind", 0.125))
    ]
    rows += [
        {**LONG, "searcher": "ascent", "seen": seen, "found": {"level 1": share}}
        for seen, share in (("combined", 1.0), ("blind", 0.75))
    ]
    long_of(tmp_path, rows)
    *_, table, _ = fooling_page._long()
    assert table.splitlines()[0].split("|")[2:5] == [
        " ascent, 1000 steps ",
        " generator, 1000 steps ",
        " blind, the most ",
    ]
    assert cells_of(table) == [["plain: level 1", "100", "50", "75"]]


@pytest.mark.parametrize("seen", [None, "two"])
def test_longer_searches_climb_from_every_start_and_see_the_detector(toy, seen):
    import fooling_long

    (net, detectors), y = toy, torch.arange(N)
    detector = detectors.get(seen)
    begun = torch.cat([Noise(net).draw((N, *net.image_shape)) for _ in range(2)])
    found = fooling_long.searched(net, y, begun, "ascent", 3, 0, detector)
    ((_, wanted),) = adversarial_inputs.ascend(net, begun, torch.cat([y, y]), detector, (3,))
    assert torch.equal(found.x, wanted)
    assert found.y.tolist() == [*y.tolist(), *y.tolist()]
    made = fooling_long.searched(net, y, begun, "generator", 2, 1, detector)
    assert torch.equal(made.x, adversarial_inputs.invert(net, y, 2, 1, detector))
    assert made.y.tolist() == y.tolist()


def test_generators_of_other_seeds_count_among_the_strongest(tmp_path, monkeypatch):
    monkeypatch.setattr(fooling_page, "RESULTS", tmp_path)
    record = record_of(rows_of("plain", "level 1", "level 1", (0.1, 0.2, 0.3, 0.4)))
    found = [
        {**LONG, "steps": 200, "seed": seed, "seen": "combined", "found": {"level 1": share}}
        for seed, share in ((1, 0.5), (2, 0.75))
    ]
    long_of(tmp_path, [*found, {**LONG, "seen": "combined", "found": {"level 1": 1.0}}])
    ascent, generator = fooling_page.found_by_all(record)["plain", "level 1"].values()
    assert generator == {"found": 0.75}  # a longer one is no fair comparison
    assert ascent == {"10": 0.1, "30": 0.2, "100": 0.3}
    assert [cells[1] for cells in cells_of(fooling_page._found({"toy": [record]})[2])] == [
        "10 / 20 / 30 / 40 (1)"
    ]  # one generator each


def test_a_searcher_that_some_networks_lack_counts_for_no_other_detector():
    rows = rows_of("plain", "level 1", "MSP", (1, 1, 1, 1)) + rows_of(
        "plain", "level 1", "combined", (0, 0.1, 0.2, 0.3)
    )
    rows += rows_of("plain", "MSP", "MSP", (0.5, 0.5, 0.5, 0.5))
    most = fooling_network.strongest(rows)
    assert fooling_network.shares_found(most["plain", "level 1"]) == [0, 0.1, 0.2, 0.3]
    assert fooling_network.shares_found(most["plain", "MSP"]) == [0.5, 0.5, 0.5, 0.5]


def test_the_hardest_to_fool_are_ranked_by_the_strongest_searcher():
    rows = rows_of("plain", "MSP", "blind", (0, 0, 0.2, 0)) + rows_of(
        "plain", "MSP", "level 1", (0, 0, 0.9, 0.1)
    )
    rows += rows_of("plain", "ViM", "ViM", (0, 0, 0.5, 1)) + rows_of(
        "plain", "ViM", "combined", (0, 0.4, 0, 0)
    )
    assert cells_of(fooling_network.hardest(rows, {"plain": 0.75})[1]) == [
        ["plain: ViM", "75.00", "0 / 40 / 50 / 100"],
        ["plain: MSP", "75.00", "0 / 0 / 90 / 10"],
    ]


@pytest.mark.parametrize(
    ("taught", "said"),
    [((0.1, 0.2, 0.5, 0.5), "4 of 4; 0.50"), ((0.1, 0.2, 0.5, 0.6), "3 of 4; 0.60")],
)
def test_what_inversions_and_search_change_is_decided_by_the_same_detector_of_the_other_network(
    taught, said
):
    without = rows_of("plain", "level 1", "level 1", (0.25, 0.5, 1, 1)) + rows_of(
        "plain", "MSP", "MSP", (1, 1, 1, 1)
    )
    assert fooling_page._decided({"toy": [record_of(without)]}) == []
    for network, what in (("loop", "inversions"), ("loop-search", "both"), ("search", "search")):
        record = record_of(
            [
                *without,
                *rows_of(network, "level 1", "level 1", taught),
                *rows_of(network, "MSP", "MSP", (1, 1, 1, 1)),
            ]
        )
        record |= {"accuracy": {}}
        cells, *starts = cells_of(fooling_page._decided({"toy": [record]})[2])
        assert cells == [what, said]
        if what == "both":
            noise, generator = (
                ["- both, noise", "3 of 3; 0.50"],
                ["- both, generator, 200 steps", f"{said[0] == '4':d} of 1; {taught[-1]:.2f}"],
            )
            assert starts == [noise, generator]
        else:
            assert starts == []
    two = {
        "toy": [record, record, record_of(without, accuracy={})]
    }  # a seed without such a network does not count
    assert cells_of(fooling_page._decided(two)[2]) == [
        ["search", f"{2 * int(said[0])} of 8; {said[-4:]}"]
    ]


def test_networks_that_are_the_same_are_said_to_be():
    networks = (
        {"loop-search": "a", "search": "a"},
        {"loop-search": "a", "search": "b"},
        {"loop-search": "a"},
        {},
    )
    records = [record_of([], seed=seed, networks=of) for seed, of in enumerate(networks)]
    (said,) = fooling_page._alike({"toy": records})
    assert said.startswith("On toy-20x1-conv3-seed0 *loop-search*")
    assert fooling_page._alike({"toy": records[1:]}) == []


def test_what_is_found_where_nothing_was_to_be_found_is_held_by_no_bar():
    record = record_of(
        rows_of("plain", "level 1", "level 1", (0, 0, 0, 0.5))
        + rows_of("loop", "level 1", "level 1", (0, 0, 0.1, 0.1))
    )
    found = list(fooling_page.comparisons([record], "inversions"))
    assert [(one.steps, one.held) for one in found] == [
        ("100", False),
        ("found", True),
    ]  # the others say nothing
    assert fooling_page._held(found) == "1 of 2; inf"


def test_the_other_bars_are_decided_by_the_numbers():
    blind = [
        {**row, "detector": "level 1"}
        for row in rows_of("loop-search", "", "blind", (0.1, 0.3, 0.2, 0.05))
    ]
    garbage = {
        "plain": {"id": 0, "letters": 1, "digits": 0.5},
        "loop-search": {"id": 0, "letters": 0.75, "digits": 0.5},
    }
    accuracies = [{"plain": 0.9, "loop-search": 0.85}, {"plain": 0.8, "loop-search": 0.75}]
    records = [record_of(blind, accuracy=accuracy, garbage=garbage) for accuracy in accuracies]
    said = [cells[1] for cells in cells_of(fooling_page._bars({"toy": records})[1])]
    assert said == [
        "80.00 beside 85.00 ± 7.07: held",
        "50.0 beside 50.0: held",
        "garbage class 0, combined 0, combined, largest 0, level 1 30: not held",
    ]
    worse = {**garbage, "loop-search": {"id": 0, "letters": 0.25, "digits": 0.5}}
    records = [
        record_of([], accuracy={"plain": 0.9, "loop-search": value}, garbage=worse)
        for value in (0.85, 0.86)
    ]
    said = [cells[1] for cells in cells_of(fooling_page._bars({"toy": records})[1])]
    assert [one.rpartition(": ")[2] for one in said] == ["not held", "not held", "held"]
    said = [cells[1] for cells in cells_of(fooling_page._bars({"toy": records[:1]})[1])]
    assert said[0].endswith(": one seed")


def test_a_front_page_has_the_costs_of_each_network():
    record = {
        "accuracy": {"plain": 0.5},
        "garbage": {"plain": {"id": 0.125, "letters": 0.75, "digits": 0.25}},
    }
    other = {
        **record,
        "accuracy": {"plain": 0.5, "loop": 0.75},
        "garbage": {"plain": record["garbage"]["plain"], "loop": {"id": 0, "letters": 1}},
    }
    plain, loop = cells_of(fooling_page._cost({"toy": [record, other]})[2])
    assert plain == ["toy: plain", "50.00 ± 0.00", "12.50 ± 0.00", "25.0 ± 0.0"]
    assert loop == ["toy: loop", "75.00", "0.00", "100.0"]


def test_the_front_page_says_what_networks_apart_take_for_the_class():
    rows = rows_of("plain", "combined, largest", "combined, largest", (0, 0, 0, 0)) + rows_of(
        "plain", "level 1", "level 1", (0, 0, 0, 0)
    )
    for row, judged, confidence in zip(rows, (0.25, 0.5, 1, 1), (0.75, None, 0, 0), strict=True):
        row |= {"judged": judged, "confidence": confidence}
    record = record_of(rows, accuracy={"plain": 1, "loop": 1})
    assert cells_of(fooling_page._like({"toy": [record]})[2]) == [
        ["toy: plain", "25", "75", "50", "-"]
    ]
