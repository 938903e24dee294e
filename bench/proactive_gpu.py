"""Copying ahead over a GPU's bus: the harness of `proactive.py` with experts in host memory, the most telling first.

python3 bench/proactive_gpu.py --out FOLDER --minutes 8     # as many cases as fit; run again, it goes on
python3 bench/proactive_gpu.py --out FOLDER --quick         # a rehearsal, tiny, also without a GPU

Needs torch, triton, transformers; accelerate, moe-policylang and matplotlib where they can be imported. Everything goes
to the folder (default: bench/results/, by the GPU's name). A worker measures; what takes the device down, or hangs, is
noted as failed, and the rest goes on in a new one.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import record  # noqa: E402
import watch  # noqa: E402

if TYPE_CHECKING:
    import torch
    from proactive import Length
    from subjects import InMemory

PATIENCE = 900.0
"""Seconds after which a case counts as hung."""

QWEN, DEEPSEEK = "Qwen3-30B", "DeepSeek-V2-Lite"
BUS = "25GB/s"
"""The limited link: PCIe 4.0 x16, as in the paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to measure. study: the CSV. subject: what is measured, by a name of `Subjects`."""

    study: str
    case: str
    subject: str
    run: Callable[[InMemory, record.Results], None]

    def __str__(self) -> str:
        return f"{self.study}: {self.case}"


class Subjects:
    """Models in the host's memory by name, made when they are asked for; one at a time, as they are large."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self._device, self._quick = device, quick
        self._name, self._subject = "", None

    def get(self, name: str) -> InMemory:
        if name != self._name:
            self._name, self._subject = "", None
            gc.collect()
            self._subject = self._make(name)
            self._name = name
        return self._subject

    def _make(self, name: str) -> InMemory:
        import layers
        from models import MODEL
        from subjects import InMemory, inflated

        print(f"Making {name} in memory", flush=True)
        shape, _, kind = name.partition(", ")
        if kind == "layers":
            return layers.subject_of(shape_of(shape, self._quick), self._device, 2 if self._quick else layers.LAYERS)
        nbytes = 200_000 if self._quick else shape_of(shape, False).expert_bytes(dtype())
        return InMemory(inflated(MODEL, nbytes), self._device)


def dtype() -> torch.dtype:
    import torch

    return torch.bfloat16


def shape_of(name: str, quick: bool) -> Any:
    """Return a real layer's shape, in a rehearsal with tiny experts."""
    from dataclasses import replace

    from promoe_triton.kernels.shapes import SHAPES

    return replace(SHAPES[name], D=64, F=16) if quick else SHAPES[name]


def cases(quick: bool) -> list[Case]:
    """Return everything, in order. What the first eight minutes are for comes first."""
    import layers
    import others
    import proactive
    from proactive import Length

    def length(warm_up: int, tokens: int, repeats: int) -> Length:
        return (
            Length(warm_up=2, tokens=3, repeats=2) if quick else Length(warm_up=warm_up, tokens=tokens, repeats=repeats)
        )

    def study(of: str, limited: bool) -> tuple[str, dict[str, Any]]:
        name = "proactive" if of == QWEN else "proactive-deepseek"
        return (f"{name}-25gbps", {"bandwidth": BUS}) if limited else (name, {})

    def ablation(of: str, share: float, limited: bool = False) -> Case:
        name, common = study(of, limited)
        targets = {0.5: 1.25, 0.75: 1.25} if of == QWEN else {}
        run = partial(
            proactive.ablation,
            share=share,
            length=length(32, 128, 3),
            targets=dict.fromkeys(SHARES, 1.0) | targets,
            **common,
        )
        return Case(study=name, case=proactive.ablation_case(share), subject=of, run=run)

    def prompt(of: str, tokens: int, limited: bool = False) -> Case:
        name, common = study(of, limited)
        tokens = 16 if quick else tokens
        run = partial(proactive.prompt_after_another, tokens=tokens, repeats=2 if quick else 3, **common)
        return Case(study=name, case=proactive.prompt_case(tokens), subject=of, run=run)

    def batch(of: str, size: int, limited: bool = False) -> Case:
        name, common = study(of, limited)
        case = proactive.batch_case(size)
        run = partial(proactive.two_of_them, case=case, length=length(16, 64, 3), batch=size, **common)
        return Case(study=name, case=case, subject=of, run=run)

    def chance(of: str, link: str, **common: Any) -> Case:
        run = partial(proactive.chance, link=link, length=length(16, 64, 6), **common)
        return Case(study="proactive", case=proactive.chance_case(link), subject=of, run=run)

    def look(of: str, link: str, **common: Any) -> Case:
        run = partial(proactive.first_look, length=length(16, 40, 1), **common)
        return Case(study=f"first-look{link}", case=proactive.FIRST_LOOK, subject=of, run=run)

    def whole(of: str) -> Case:
        run = partial(proactive.whole_layers, length=length(2, 12, 2))
        return Case(study="proactive", case=proactive.WHOLE_LAYERS, subject=of, run=run)

    def alone(of: str) -> Case:
        run = partial(proactive.each_alone, length=length(16, 64, 3))
        return Case(study="proactive", case=proactive.EACH_ALONE, subject=of, run=run)

    def layer(of: str, T: int, share: float = 0.5, limited: bool = False) -> Case:
        T = 16 if quick and T > 8 else T
        steps = (3 if T == 1 else 1) if quick else 64 if T == 1 else 32 if T <= 8 else 2
        common = {"bandwidth": BUS} if limited else {}
        run = partial(
            layers.measure,
            shape=shape_of(of, quick),
            T=T,
            share=share,
            repeats=2 if quick else 3,
            steps=steps,
            **common,
        )
        name = "layers-25gbps" if limited else "layers"
        return Case(study=name, case=layers.case_of(of, T, share), subject=f"{of}, layers", run=run)

    beside = partial(others.measure, length=length(16, 48, 3))
    rivals = [
        Case(study="others", case=others.case_of(share), subject=QWEN, run=partial(beside, share=share))
        for share in (0.5, 0.25)
    ]
    rounds = (2, 3) if quick else (4, 25)
    urgent = Case(study="urgent", case="urgent", subject=QWEN, run=partial(measure_urgent, rounds=rounds))
    tail = (0.75, 0.25, 0.375, 0.125)
    order = [
        look(QWEN, ""),
        look(QWEN, "-25gbps", bandwidth=BUS),
        ablation(QWEN, 0.5),
        rivals[0],
        ablation(QWEN, 0.5, limited=True),
        urgent,
        prompt(QWEN, 512),
        ablation(QWEN, 0.25),
        batch(QWEN, 4),
        layer(QWEN, 1),
        layer(QWEN, 1, limited=True),
        # The first eight minutes are meant to end about here.
        *(ablation(QWEN, share) for share in tail),
        *(prompt(QWEN, tokens) for tokens in (128, 2048)),
        *(batch(QWEN, size) for size in (1, 2, 8)),
        chance(QWEN, "the bus"),
        chance(QWEN, "the bus at 2.5 GB/s", bandwidth="2.5GB/s"),
        chance(QWEN, "the bus at 25 GB/s", bandwidth=BUS),
        alone(QWEN),
        whole(QWEN),
        *(ablation(QWEN, share, limited=True) for share in tail),
        *(prompt(QWEN, tokens, limited=True) for tokens in (512, 128, 2048)),
        *(batch(QWEN, size, limited=True) for size in (1, 2, 4, 8)),
        rivals[1],
        *(layer(QWEN, T, share, limited) for T in (1, 8, 512) for share in (0.5, 0.25) for limited in (False, True)),
        *(layer(DEEPSEEK, T, s, limited) for T in (1, 8, 512) for s in (0.5, 0.25) for limited in (False, True)),
        *(ablation(DEEPSEEK, share, limited) for share in (0.5, 0.25) for limited in (False, True)),
        *(prompt(DEEPSEEK, 512, limited) for limited in (False, True)),
        *(batch(DEEPSEEK, 4, limited) for limited in (False, True)),
    ]
    return list({str(case): case for case in order}.values())


SHARES = (0.5, 0.75, 0.25, 0.375, 0.125)


def measure_urgent(subject: InMemory, results: record.Results, rounds: tuple[int, int]) -> None:
    """Ask for experts while others are copied from host memory to the device."""
    if results.has("urgent"):
        return
    import urgent

    from promoe_triton.links.device import DeviceFiller
    from promoe_triton.links.sources import HostSource
    from promoe_triton.links.streams import streams_of
    from promoe_triton.memory import DeviceMemory
    from promoe_triton.stores.host import HostStore

    used = list(subject.layouts.items())[:3]
    modules = [subject.model.get_submodule(path) for path, _ in used]
    layouts = [layout for _, layout in used]
    specs = [layout.spec(module) for layout, module in zip(layouts, modules, strict=True)]
    named = [
        {name: module.get_parameter(name) for name in layout.names}
        for layout, module in zip(layouts, modules, strict=True)
    ]
    store = HostStore(specs, layouts, named)
    streams = streams_of(subject.device)
    memory = DeviceMemory(len(used) * urgent.SLOTS, store.slot_bytes(0, layouts[0].experts), subject.device)
    road = urgent.bus(
        lambda: DeviceFiller(HostSource(store, streams), [memory] * len(used), streams),
        streams,
        len(used),
        layouts[0].experts,
    )
    urgent.measure(road, results, *rounds)


def about(device: torch.device, quick: bool) -> dict[str, str]:
    """Return what every row says of where and when."""
    from promoe_triton.kernels.provenance import about_device

    found = about_device(device)
    if device.type != "cuda":
        found = found | {"device": record.device()}
    return {
        **found,
        "accelerate": _version("accelerate"),
        "moe_policylang": _version("moe-policylang"),
        "host": record.device(),
        "size": "a rehearsal" if quick else "as named",
        "commit": record.commit(),
        "date": record.now(),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for everything (default: bench/results/, by the GPU's name)")
    parser.add_argument("--minutes", type=float, help="begin no case after so many minutes (default: measure all)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny experts and few tokens; on the CPU where there is no GPU"
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases whose description has one of these texts")
    parser.add_argument("--force", action="store_true", help="measure again what the CSV have already")
    parser.add_argument("--list", action="store_true", help="list the cases in their order, measure nothing")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.list:
        print("\n".join(map(str, chosen(args))))
        return
    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and not args.quick:
        sys.exit("no GPU: only --quick, a rehearsal over RAM, runs here")
    args.out = (args.out or default_folder(device)).resolve()
    # What is compiled must not lie where nobody looks for it.
    for name, folder in (("TRITON", "triton"), ("TORCHINDUCTOR", "inductor")):
        os.environ.setdefault(f"{name}_CACHE_DIR", str(args.out / "cache" / folder))
    os.environ.setdefault("MPLCONFIGDIR", str(args.out / "cache" / "matplotlib"))
    sys.exit(work(args, device) if args.worker is not None else supervise(args))


def default_folder(device: torch.device) -> Path:
    """Return where results of this device lie; those of a rehearsal without one in a temporary folder."""
    import torch

    if device.type == "cpu":
        return Path(tempfile.gettempdir()) / "promoe-bench-quick-gpu"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return record.RESULTS.parent / name


def chosen(args: argparse.Namespace) -> list[Case]:
    found = cases(args.quick)
    return [case for case in found if not args.only or any(text in str(case) for text in args.only)]


def supervise(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    marker = args.out / "current.json"
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(time.time())]
    code = watch.supervise(command, marker, PATIENCE, partial(note_failure, args.out, marker))
    drawn = subprocess.run([sys.executable, ROOT / "bench" / "figures.py", "--out", args.out], check=False).returncode
    if drawn:
        print("no figures; the numbers stand", flush=True)
    for path in sorted(args.out.glob("*.csv")):
        for line in record.verdicts(path):
            print(f"{path.stem}: {line.strip()}")
    return code


def note_failure(out: Path, marker: Path, code: int) -> None:
    """Append a row for the case that a worker was at when it ended."""
    noted: Mapping[str, Any] = json.loads(marker.read_text())
    record.Results(out, noted["study"], about=noted["about"]).write(
        [failure(noted["case"], watch.reason(code, PATIENCE))]
    )


def failure(case: str, reason: str) -> record.Row:
    return record.row(case, "", "failed", "", [0.0], note=" ".join(reason.split())[:300])


def answers(device: torch.device) -> bool:
    """Whether a device still does what it is told, after an error."""
    import torch

    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def work(args: argparse.Namespace, device: torch.device) -> int:
    """Measure cases until they or the minutes are spent."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # cuDNN's attention plans anew for every length of the text: milliseconds a layer, for all that is compared here.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu":
        torch.set_num_threads(1)
    where = about(device, args.quick)
    todo = chosen(args)
    marker = args.out / "current.json"
    subjects = Subjects(device, args.quick)
    print(f"{where['device']}, {len(todo)} cases, results in {args.out}", flush=True)
    for number, case in enumerate(todo):
        results = record.Results(args.out, case.study, force=args.force, about=where)
        if results.has(case.case):
            continue
        if args.minutes and time.time() - args.worker > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over, {len(todo) - number} cases are left; run again", flush=True)
            break
        marker.write_text(json.dumps({"study": case.study, "case": case.case, "about": where}))
        began = time.monotonic()
        try:
            case.run(subjects.get(case.subject), results)
        # Memory that is too small, and the like: that is a result, and the next case may fit.
        except Exception as error:
            print(f"  {case}: {error!r}", file=sys.stderr, flush=True)
            results.write([failure(case.case, repr(error))])
            subjects = Subjects(device, args.quick)
            if not answers(device):
                # The row is written: a new worker goes on with the next case.
                return watch.GO_ON
        print(f"  {case}: {time.monotonic() - began:.0f} s", flush=True)
    marker.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    main()
