"""Messages about a teacher's first outputs in a fit."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from kd_lightning.teachers.findings import Finding, with_teacher_name


def report(findings: list[Finding], teacher: str = "teacher") -> None:
    """Print the findings that are fine in one line, and warn of each of the others.

    Args:
        findings: What :class:`~kd_lightning.teachers.probe.TeacherProbe` has found.
        teacher: Name of the teacher in the messages.
    """
    if teacher != "teacher":
        findings = [with_teacher_name(finding, teacher) for finding in findings]
    if fine := [f"{finding.name}: {finding.text}" for finding in findings if finding.hint is None]:
        rank_zero_info("; ".join(fine))
    for finding in findings:
        if finding.hint is not None:
            advice = "kd-lightning doctor examines it further"
            rank_zero_warn(f"{finding.name}: {finding.text}: {finding.hint} ({advice})")
