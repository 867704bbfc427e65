"""Rules that the engine process and the gateway share; each is written once and knows neither of them."""
