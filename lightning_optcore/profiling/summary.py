"""The report as text: one line while it runs, a few at its end."""

from __future__ import annotations

from lightning_optcore.profiling.profile_report import Finding, ProfileReport


def verdict(finding: Finding) -> str:
    """Return a finding in one line: the override first, where there is one.

    Example:
        >>> verdict(Finding("logging", "logging", 0.4, "high", 0.9, ("logging is 40% of the step",)))
        'logging: logging is 40% of the step'
    """
    text = "; ".join(finding.evidence)
    if not finding.recommendations:
        return f"{finding.cause}: {text}"
    best = finding.recommendations[0]
    low, high = best.expected_speedup
    gain = f"; expected {low:.1f}x to {high:.1f}x" if high > 1 else ""
    if not best.override:
        return f"{finding.cause}: {text}; {best.why}"
    return f"{best.override}: {text}{gain} ({finding.cause})"


def live_text(report: ProfileReport) -> str:
    """Return the live line: step time, the largest phases, the verdict."""
    largest = sorted(report.phases.items(), key=lambda item: -item[1].share)[:4]
    shares = ", ".join(f"{phase} {figures.share:.0%}" for phase, figures in largest)
    return f"{report.step_ms.get('p50', 0):.3g} ms a step: {shares} | {report.primary.cause}"


def summary_text(report: ProfileReport) -> str:
    """Return the summary at the end of a run."""
    lines = [f"Profile of {report.stage}: {report.steps} steps in {report.wall_seconds:.1f} s"]
    for phase, figures in sorted(report.phases.items(), key=lambda item: -item[1].seconds):
        if figures.share >= 0.001:
            lines.append(f"  {phase:<20}{figures.seconds:>9.2f} s {figures.share:>6.1%}")
    lines += [f"  {verdict(finding)}" for finding in report.findings]
    if report.operators:
        largest = list(report.operators.items())[:4]
        lines.append("  the slowest steps: " + ", ".join(f"{name} {share:.0%}" for name, share in largest))
    lines += [f"  note: {note}" for note in report.notes]
    return "\n".join(lines)
