"""Pictures of models, drawn from their code: what flows where, who sees whom, what an objective does to a text."""
