"""What the runs showed: results.json read back, plain verdicts, a table for the terminal, a self-contained page.

::

    runs.py      load_run; who is the start and who the control
    verdicts.py  method against control, in sentences
    summary.py   the numbers of the summary, as a table for the terminal
    charts.py    curves, and the policies that a run chose from, as SVG
    page.py      report.html
"""

from tutelage.report.page import write_report
from tutelage.report.runs import load_run
from tutelage.report.summary import summary_table
from tutelage.report.verdicts import verdicts

__all__ = ["load_run", "summary_table", "verdicts", "write_report"]
