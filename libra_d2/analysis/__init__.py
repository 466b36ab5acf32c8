"""Pictures, and the numbers behind them, of what balance does in a model."""
