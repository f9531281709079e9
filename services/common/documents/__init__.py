"""Charter, study, plan and policy: strict models over exact bytes."""
