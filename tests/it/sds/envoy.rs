//! Two Envoys that take their certificates from the agent.
