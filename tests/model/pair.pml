/*
 *  Licensed under the Apache License, Version 2.0 (the "License"); you may
 *  not use this file except in compliance with the License. You may obtain
 *  a copy of the License at
 *
 *       http://www.apache.org/licenses/LICENSE-2.0
 *
 *  Unless required by applicable law or agreed to in writing, software
 *  distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
 *  WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
 *  License for the specific language governing permissions and limitations
 *  under the License.
 */

/*
 * One generation of a pair: output commit and one survivor, over every interleaving of primary,
 * standby, managers and the network between them. tests/functional/test_protocol_model.py has spin
 * go through all of it (about 10,000 states).
 *
 * What may happen at any time: the link is cut (what is under way arrives, or does not); the
 * primary's guest dies; the primary stands still, and goes on; a question to the managers, or their
 * answer, gets lost, as often as it likes.
 *
 * What is said about time, since nothing else here has any:
 *  - A standby gives its primary up only when the link is cut or the primary stands still, and only
 *    when what it sent before has arrived: peer_timeout_ms is much longer than a packet's way.
 *  - A primary that stood still for so long knows it when it goes on (replication/link.py).
 *
 * With a macro named UNSAFE_... the model does what the code must not. Then spin must find a
 * violation, or it could find none at all.
 */

#define EPOCHS 4      /* pauses that the primary may make */
#define DEPTH  2      /* checkpoints under way at most */

mtype = { RUNS, ASKS, ALONE, ENDED };           /* the primary */
mtype = { WAITS, LOADED, ACTIVE, GONE };        /* the standby */

mtype primary = RUNS;
mtype standby = WAITS;
byte winner = 0;                                 /* of the managers' row: 0 nobody, 1 primary, 2 standby */

bool linked = true;
bool stopped = false;                            /* the primary's host stands still */
bool stood = false;                              /* ... and has done so for peer_timeout */
bool guest = true;                               /* the primary's QEMU lives */

byte paused = 0;                                 /* the last checkpoint that was taken */
byte known = 0;                                  /* committed, as the primary was told */
byte released = 0;                               /* the last epoch whose packets have left */
byte committed = 0;                              /* whole on the standby */
bool aloneReleased = false;                      /* the primary sends without a standby */

chan checkpoints = [DEPTH] of { byte };
chan answers = [DEPTH] of { byte };

#ifdef UNSAFE_STOOD
#define FRESH true
#else
#define FRESH !stood
#endif

/* A packet leaves the primary's host. */
inline release(n) {
    assert(standby != ACTIVE);                   /* rule 3: two hosts would send */
    released = n
}

active proctype Primary() {
end:
    do
    :: atomic { primary == RUNS && !stopped && guest && linked && paused < EPOCHS &&
                paused - known < DEPTH && len(checkpoints) < DEPTH ->
            paused++;
            checkpoints!paused;
#ifdef UNSAFE_EARLY
            release(paused)
#endif
       }
    :: atomic { primary == RUNS && !stopped && len(answers) > 0 && FRESH -> answers?known; release(known) }   /* a dead guest's packets are its past */
    :: atomic { primary == RUNS && !stopped && guest && (!linked || stood) ->
            primary = ASKS }
    :: atomic { primary == RUNS && !stopped && !guest && (!linked || stood) ->
            primary = ENDED }                    /* nobody claims for a guest that is dead */
    :: atomic { primary == ASKS && !stopped && !guest -> primary = ENDED }
    :: atomic { primary == ASKS && !stopped && guest ->
#ifdef UNSAFE_ISOLATED
            primary = ALONE; aloneReleased = true; release(paused)
#else
            if
            :: winner == 0 -> winner = 1         /* asked; the answer may get lost */
            :: else
            fi;
            if
            :: winner == 1 -> primary = ALONE; aloneReleased = true; release(paused)
            :: winner == 2 -> primary = ENDED    /* destroyed */
            :: skip                              /* no answer: it asks again */
            fi
#endif
       }
    :: atomic { primary == ASKS && !stopped && guest -> skip }   /* the question got lost */
    od
}

active proctype Standby() {
    byte n;
end:
    do
    :: atomic { standby == WAITS && len(checkpoints) > 0 ->
            checkpoints?n;
            assert(n == committed + 1);          /* rule 2: whole, in order */
            committed = n;
            if
            :: linked && len(answers) < DEPTH -> answers!n
            :: else                              /* cut: the answer is lost */
            fi }
    :: atomic { standby == WAITS && (stopped || ((!linked || !guest) && len(answers) == 0)) &&
                len(checkpoints) == 0 ->
            if
            :: committed == 0 -> standby = GONE  /* nothing to go on from */
            :: else -> standby = LOADED
            fi;
            if
            :: stopped -> stood = true
            :: else
            fi }
    :: atomic { standby == LOADED ->
#ifdef UNSAFE_NOT_ASKED
            winner = 2;
#else
            if
            :: winner == 0 -> winner = 2
            :: else
            fi;
#endif
            if
            :: winner == 2 ->
                    assert(released <= committed);   /* rule 1: nothing that was seen is lost */
                    assert(!aloneReleased);          /* rule 3 */
                    standby = ACTIVE
            :: winner == 1 -> standby = GONE
            :: skip
            fi }
    :: atomic { standby == LOADED -> skip }
    od
}

/* Everything else that happens; each thing once, the primary's host more often. */
active proctype World() {
    byte lost;
    byte stops = 0;
end:
    do
    :: atomic { linked -> linked = false }
       /* What was under way when it was cut arrives, or its end is lost. */
    :: atomic { !linked && len(checkpoints) > 0 ->
            do :: len(checkpoints) > 0 -> checkpoints?lost :: else -> break od }
    :: atomic { !linked && len(answers) > 0 ->
            do :: len(answers) > 0 -> answers?lost :: else -> break od }
    :: atomic { guest && primary != ENDED -> guest = false }
    :: atomic { !stopped && stops < 2 -> stopped = true; stops++ }
    :: atomic { stopped -> stopped = false }
    od
}
