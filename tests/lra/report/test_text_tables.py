from subquad.lra.report import text_tables


def test_what_latex_and_markdown_take_for_signs_is_escaped():
    assert text_tables.escaped("a_b \\ 5% ± <2>") == r"a\_b \textbackslash{} 5\% $\pm$ \textless{}2\textgreater{}"
    assert text_tables.markdown([["a", "b"], ["x|y", "1"]]).splitlines()[-1] == r"| x\|y | 1 |"
    assert text_tables.latex([["a", "b"], ["x_y", "1"]]).splitlines()[4] == r"x\_y & 1 \\"


def test_the_table_is_printed(capsys):
    text_tables.print_table([["race", "ms"], ["one", "1.5"]])
    assert "race" in (shown := capsys.readouterr().out) and "1.5" in shown
