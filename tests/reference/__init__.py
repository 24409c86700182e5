"""The papers' formulas in float64, one page a paper, equations numbered. No page here knows the code that it checks."""
