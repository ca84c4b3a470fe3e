"""Draws docs/images/scale.svg: ``make rehearse-scale ARGS="--simulate --svg docs/images/scale.svg"``.

Three charts: the recorded rehearsal that the rule drove, with the simulation of the same demand beside it; a step; a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from tests.rehearsal.compare import Case, simulate
from tests.rehearsal.demand import burst, recorded, step
from tests.rehearsal.manifests import rule_for
from tests.rehearsal.simulate import Model, Outcome, Simulation, Views, needed

INK, NEED, WANTED, READY, LOAD = "#334155", "#94a3b8", "#ea580c", "#1d4ed8", "#dcfce7"
WIDTH, HEIGHT = 900, 800
Points = Sequence[tuple[float, float]]


@dataclass
class Chart:
    """A chart in a corner of the picture; ``right``: where the axis ends, ``most``: what is at its top."""

    top: int
    title: str
    right: float
    most: float
    unit: str = "min"
    tick: float = 10
    left: int = 70
    width: int = 760
    height: int = 170
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        return round(self.left + self.width * min(value, self.right) / self.right, 1)

    def y(self, value: float, most: float | None = None) -> float:
        return round(self.top + self.height * (1 - min(1.0, value / (most or self.most))), 1)

    def area(self, points: Points, *, most: float) -> None:
        """Sessions, ready or held, on a scale of their own: ``most`` at the top."""
        shape = " ".join(f"{self.x(at)},{self.y(value, most)}" for at, value in points)
        base = self.y(0)
        self.parts.append(
            f'<polygon points="{self.left},{base} {shape} {self.x(points[-1][0])},{base}" fill="{LOAD}" stroke="none"/>'
        )
        for share in (0.5, 1.0):
            y = self.y(share, 1.0)
            self.parts.append(
                _text(self.left + self.width + 8, y + 4, f"{most * share:,.0f}", size=11, colour="#15803d")
            )

    def line(self, points: Points, colour: str, *, dash: str = "", width: float = 1.8) -> None:
        """Steps from one value to the next."""
        path, last = [], None
        for at, value in points:
            if last is None:
                path.append(f"M{self.x(at)} {self.y(value)}")
            elif value != last:
                path.append(f"H{self.x(at)}V{self.y(value)}")
            last = value
        path.append(f"H{self.x(points[-1][0])}")
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>')

    def drawn(self) -> Iterable[str]:
        yield _text(self.left, self.top - 12, self.title, size=14, bold=True)
        yield from self.parts
        base, end = self.y(0), self.left + self.width
        yield f'<path d="M{self.left} {self.top}V{base}H{end}" fill="none" stroke="{INK}"/>'
        for value in range(0, int(self.most) + 1, 2):
            yield _text(self.left - 8, self.y(value) + 4, str(value), size=11, anchor="end")
        at = 0.0
        while at <= self.right:
            yield _text(self.x(at), base + 16, f"{at:g} {self.unit}", size=11, anchor="middle")
            at += self.tick


def _text(
    x: float, y: float, text: str, *, size: int, anchor: str = "start", bold: bool = False, colour: str = "#0f172a"
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}"{weight} fill="{colour}">{text}</text>'


def rehearsed(ask: Views) -> tuple[Outcome, dict[str, Points]]:
    """The recorded rehearsal in autoscaled mode: what the simulation makes of its demand, and what really was."""
    demand, file = recorded("autoscaled")
    rule = replace(rule_for(file["slots"]).faster(file["faster"]), most=file["most"])
    model = Model(slots=file["slots"], start_up=file["ready_after"], step=1)
    series = file["series"]
    real: dict[str, Points] = {
        "load": [(at, runnable + running) for at, runnable, running, *_ in series],
        "wanted": [(row[0], row[4]) for row in series],
        "ready": [(row[0], row[5]) for row in series],
    }
    return Simulation(demand, model, ask, rule=rule).run(), real


def _first(ask: Views) -> Chart:
    outcome, real = rehearsed(ask)
    chart = Chart(80, "Rehearsed, all times of the rule divided by ten", outcome.demand.seconds, 7, unit="s", tick=30)
    chart.area(real["load"], most=max(value for _, value in real["load"]))
    chart.line([(now.at, now.wanted) for now in outcome.series], INK, dash="3 3", width=1.4)
    chart.line(real["wanted"], WANTED)
    chart.line(real["ready"], READY)
    return chart


def _simulated(ask: Views, case: Case, *, top: int, title: str) -> Chart:
    outcome, _ = simulate(case, ask)
    minutes = case.demand.seconds / 60
    chart = Chart(top, title, minutes, 11)
    load = [(now.at / 60, float(now.runnable + now.running)) for now in outcome.series[::5]]
    chart.area(load, most=max(value for _, value in load))
    need = needed(case.demand, case.model.slots, most=rule_for(case.model.slots).most)
    highest = [(second / 60, max(need[max(0, second - 30) : second + 30])) for second in range(0, len(need) - 2, 5)]
    chart.line(highest, NEED, dash="5 4")
    chart.line([(now.at / 60, now.wanted) for now in outcome.series], WANTED)
    chart.line([(now.at / 60, now.ready) for now in outcome.series], READY)
    return chart


def draw(ask: Views) -> str:
    """The picture, as SVG."""
    charts = [
        _first(ask),
        _simulated(ask, Case(step()), top=330, title="Simulated: 40 busy slots, 500 from minute 10 to 40"),
        _simulated(ask, Case(burst()), top=580, title="Simulated: 10,000 turns of 30 s at once"),
    ]
    legend = [
        (WANTED, "", "replicas wanted"),
        (READY, "", "replicas ready"),
        (NEED, "5 4", "replicas needed"),
        (INK, "3 3", "replicas wanted, simulated"),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" role="img" '
        'aria-label="How the number of workers follows the load: rehearsed, and simulated">'
    )
    parts = [head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>']
    for place, (colour, dash, text) in enumerate(legend):
        x = 70 + 190 * place
        parts.append(
            f'<path d="M{x} 24H{x + 28}" stroke="{colour}" stroke-width="2.4" stroke-dasharray="{dash or "none"}"/>'
        )
        parts.append(_text(x + 36, 28, text, size=12))
    parts.append(f'<rect x="70" y="36" width="28" height="10" fill="{LOAD}" stroke="#15803d" stroke-width="0.5"/>')
    parts.append(_text(106, 45, "sessions ready or held (scale on the right)", size=12))
    for chart in charts:
        parts += chart.drawn()
    return "\n".join([*parts, "</svg>", ""])
