"""Co-Evolving Policy Distillation: expert policies that train in parallel and teach each other all along."""
