"""The paper's experiments: its tables, its figures, and the sweeps behind them."""
