"""Proof that invariants of a table hold at every moment, for any number of connections.

    terms         formulas, read by z3 and by Python
    relation      what each row of a table does to variables: symbolic execution of the rows
    proof         every obligation discharged by z3, or a counterexample; needs the extra `proof`
    allocation    an allocation at its provider: variables, what may happen, invariants
    variants      for each invariant a variant of it that breaks it
    observed      the kernels of the explorer compared with the relation, and held to the invariants

The first three know nothing of this protocol. A table of your own, with variables, what its orders
do to them and what may happen, is proved in the same way:

    relation = Relation(TABLE, VARIABLES, orders=ORDERS, occurrences=occurrences_of(TABLE))
    proof = Prover(relation, INVARIANTS).prove()
    assert proof.is_complete, proof.refuted[0]
"""
