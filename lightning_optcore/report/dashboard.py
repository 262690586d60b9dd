"""A page that follows running jobs from the store (Dash, extra ``dashboard``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_optcore.report import job_panels, profile_figures
from lightning_optcore.report.figures import plotly, styled
from lightning_optcore.store import Run, Store

# What a page can show, in the order in which it is asked for.
PANELS = ("verdict", "phases", "shares", "machine", "ranks", "curves", "jobs", "nodes")


def dashboard(
    store: Store, *, panels: Sequence[str] = PANELS[:4], refresh_seconds: float = 2.0, limit: int = 50
) -> Any:
    """Return the application; ``.run(host="127.0.0.1")`` serves it.

    Args:
        store: Where the runs are.
        panels: Some of :data:`PANELS`.
        refresh_seconds: Seconds between two looks at the store.
        limit: Newest runs to choose from.

    Raises:
        ValueError: If a panel is unknown.
        ModuleNotFoundError: If Dash is not installed; the message names the extra.
    """
    unknown = [panel for panel in panels if panel not in PANELS]
    if unknown or not panels:
        raise ValueError(f"panels={list(panels)}: expected some of {', '.join(PANELS)}")
    try:
        import dash
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the dashboard needs Dash: pip install "lightning-optcore[dashboard]"') from error
    # Everything is served from here: the page works without a network.
    app = dash.Dash(__name__, title="lightning_optcore", update_title="", serve_locally=True)
    html, dcc = dash.html, dash.dcc
    app.layout = html.Main(
        style={"fontFamily": "system-ui, sans-serif", "maxWidth": "70rem", "margin": "0 auto", "padding": "1rem"},
        children=[
            html.H1("Runs", style={"fontSize": "1.5rem"}),
            dcc.Dropdown(id="run", placeholder="the newest run"),
            dcc.Interval(id="clock", interval=int(1000 * refresh_seconds)),
            *(html.Div(id=panel, style={"marginTop": "1rem"}) for panel in panels),
        ],
    )

    @app.callback(
        dash.Output("run", "options"),
        *(dash.Output(panel, "children") for panel in panels),
        dash.Input("clock", "n_intervals"),
        dash.Input("run", "value"),
    )
    def look(_: Any, chosen: Any) -> tuple[Any, ...]:
        runs = store.runs(limit=limit)
        options = [{"label": _label(run), "value": run.id} for run in runs]
        run = next((one for one in runs if one.id == chosen), runs[0] if runs else None)
        profiles = store.profiles(run.id) if run is not None else {}
        profile = profiles.get("fit") or next(iter(profiles.values()), None)
        return options, *(_drawn(dash, panel, run, profile, store) for panel in panels)

    return app


def _label(run: Run) -> str:
    return f"{run.id}: {run.job}, {run.status}, {run.created_at[:19]} {' '.join(run.overrides)}"


def _drawn(dash: Any, panel: str, run: Run | None, profile: Mapping[str, Any] | None, store: Store) -> Any:
    # The last two show the whole store.
    if panel == "jobs":
        return job_panels.jobs_panel(dash.html, job_panels.jobs_seen(store))
    if panel == "nodes":
        return job_panels.nodes_panel(dash.html, job_panels.nodes_seen(store))
    if run is None:
        return dash.html.P("no run yet")
    if panel == "curves":
        return _graph(dash, _curves(store.curves(run.id)))
    if profile is None:
        text = "no profile: run it with callbacks=profiler" if panel == "verdict" else ""
        return dash.html.P(text)
    if panel == "verdict":
        return _verdict(dash.html, run, profile)
    timeline = profile.get("timeline") or {}
    figures: dict[str, Callable[[], Any] | None] = {
        "shares": lambda: profile_figures.shares_figure(profile),
        "phases": (lambda: profile_figures.phases_figure(timeline)) if timeline else None,
        "machine": (lambda: profile_figures.utilisation_figure(timeline)) if timeline.get("system") else None,
        "ranks": (lambda: profile_figures.ranks_figure(profile["ranks"])) if len(profile["ranks"]) > 1 else None,
    }
    make = figures[panel]
    return _graph(dash, make()) if make is not None else dash.html.P("")


def _verdict(html: Any, run: Run, profile: Mapping[str, Any]) -> Any:
    rows = []
    for finding in profile["findings"]:
        advice = [one["override"] or one["why"] for one in finding["recommendations"]]
        cells = (finding["cause"], f"{finding['share']:.0%}", "; ".join(finding["evidence"]), "; ".join(advice))
        rows.append(html.Tr([html.Td(text, style={"padding": "0 1rem .3rem 0"}) for text in cells]))
    head = f"run {run.id} ({run.status}): {profile['steps']} steps, {profile['step_ms'].get('p50', 0):.3g} ms a step"
    return html.Div([html.P(head), html.Table(rows)])


def _curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Any:
    go, _ = plotly()
    lines = [go.Scatter(name=n, x=[s for s, _ in p], y=[v for _, v in p]) for n, p in curves.items()]
    return styled(go.Figure(lines), "metrics over training steps")


def _graph(dash: Any, figure: Any) -> Any:
    return dash.dcc.Graph(figure=figure, config={"displaylogo": False})
