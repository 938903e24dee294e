"""How good predictors and replacement policies are, on recorded routing. No model runs here, and no clock."""
