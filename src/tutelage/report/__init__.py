"""What the runs showed: plain verdicts, a table for the terminal, a self-contained page, from the records of runs.

::

    runs.py      who is the start of a run and who its control
    verdicts.py  method against control, in sentences
    summary.py   the numbers of the summary, as a table for the terminal
    charts.py    curves, and the policies that a run chose from, as SVG
    page.py      report.html
"""

from tutelage.report.page import is_report, write_report
from tutelage.report.summary import summary_table
from tutelage.report.verdicts import verdicts

__all__ = ["is_report", "summary_table", "verdicts", "write_report"]
